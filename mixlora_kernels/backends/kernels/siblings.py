"""How one launch serves siblings whose tensors are not one: kernels take tuples, and a program finds its own."""

import triton
import triton.language as tl


@triton.jit
def member(items, g, G: tl.constexpr):
    """The item of sibling g, of a tuple of G, which a program may only index by constants."""
    item = items[0]
    for other in tl.static_range(1, G):
        item = tl.where(g == other, items[other], item)
    return item


@triton.jit
def find_piece(piece, widths, G: tl.constexpr, BLOCK: tl.constexpr):
    """Of all siblings' columns in blocks, one sibling after the other: the sibling of a block, the sibling's first
    block, and the columns of the siblings before it."""
    sibling, first, before = 0, 0, 0
    blocks, columns = 0, 0
    for g in tl.static_range(G):
        after = piece >= blocks
        sibling = tl.where(after, g, sibling)
        first = tl.where(after, blocks, first)
        before = tl.where(after, columns, before)
        blocks += tl.cdiv(widths[g], BLOCK)
        columns += widths[g]
    return sibling, first, before


def count_pieces(widths, block: int):
    """The blocks of all siblings together."""
    return sum(-(-width // block) for width in widths)
