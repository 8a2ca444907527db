"""Which tokens a program works on: a tile never reaches beyond one instance.

So every token of a tile has the same r factors, what a tile sums over its tokens belongs to one instance, and a
token's place among the tiles depends on nothing but the instances' lengths: sums over tiles have a fixed order.
Packed instances begin where ``cu_seqlens`` on the device says, which the host never reads: it starts as many
programs as any division of N tokens into B instances could need, and those left over find no token.
"""

import triton
import triton.language as tl

from . import tuning


def count_tiles(N, B, L, packed: bool, rows: int):
    """Tiles of ``rows`` tokens that B instances need at most, L tokens each or N in all."""
    return N // rows + B if packed else B * -(-L // rows)


def padded_count(B, packed: bool) -> int:
    """B_PAD: the width in which ``cu_seqlens`` is read."""
    return tuning.power_of_2(B) if packed else 1


@triton.jit
def row_tile():
    """The tile of a program: the last rows first. The product before a pass has just left those in the cache, and the
    product after it begins with the first."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def find_rows(tile, cu_seqlens, B, L, ROWS: tl.constexpr, B_PAD: tl.constexpr):
    """The instance of a tile, the tile's first token and the end of its instance, which may be before that token.

    A tile that no instance needs gets instance -1 and no tokens.
    """
    if cu_seqlens is None:
        tiles = tl.cdiv(L, ROWS)
        b = tile // tiles
        start = b.to(tl.int64) * L
        return b, start + (tile % tiles) * ROWS, start + L
    else:
        starts, ends, counts = read_lengths(cu_seqlens, B, ROWS, B_PAD)
        upto = tl.cumsum(counts)  # [B_PAD]
        own = (upto > tile) & (upto - counts <= tile)
        b = tl.sum(tl.where(own, tl.arange(0, B_PAD) + 1, 0)) - 1
        first = tl.sum(tl.where(own, starts + (tile - (upto - counts)) * ROWS, 0))
        return b, first, tl.sum(tl.where(own, ends, 0))


@triton.jit
def find_tiles(b, cu_seqlens, B, L, ROWS: tl.constexpr, B_PAD: tl.constexpr):
    """The first tile of instance b, and its number of tiles and tokens."""
    if cu_seqlens is None:
        tiles = tl.cdiv(L, ROWS)
        return b * tiles, tiles, L
    else:
        starts, ends, counts = read_lengths(cu_seqlens, B, ROWS, B_PAD)
        instances = tl.arange(0, B_PAD)
        first = tl.sum(tl.where(instances < b, counts, 0))
        own = instances == b
        return first, tl.sum(tl.where(own, counts, 0)), tl.sum(tl.where(own, ends - starts, 0))


@triton.jit
def find_owner(tile, owner, L, ROWS: tl.constexpr):
    """The instance of each of some tiles: a quotient, or what ``owner`` [tiles] says where instances are packed, which
    is -1 for a tile that no instance needs."""
    if owner is None:
        return tile // tl.cdiv(L, ROWS)
    else:
        return tl.load(owner + tile)


@triton.jit
def read_lengths(cu_seqlens, B, ROWS: tl.constexpr, B_PAD: tl.constexpr):
    """Where each packed instance begins and ends, and how many tiles it needs, [B_PAD] each."""
    instances = tl.arange(0, B_PAD)
    starts = tl.load(cu_seqlens + instances, mask=instances < B, other=0)
    ends = tl.load(cu_seqlens + instances + 1, mask=instances < B, other=0)
    return starts, ends, tl.cdiv(ends - starts, ROWS)
