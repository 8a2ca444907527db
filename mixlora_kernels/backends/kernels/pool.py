"""pool: from the sums over tiles to what ``route`` reads: the mean of Equation 5, the logits, and T. One launch.

    pooled[b] = weight_b Σ_tiles sums              logits[b] = router · pooled[b]                   (Equations 5, 6, 8)
    T[i, f, e] = router_AB[i, e] · lora_A[f]      what factor f of A in slot i says of factor e of B  (Equation 7)

Everything is float32, products too, whatever torch's setting of TF32: routing must not depend on it. Both products run
over slabs of the width, which ``route`` adds up in a fixed order. T depends on parameters alone, so its programs ride
in the same launch.
"""

import triton
import triton.language as tl

from . import tuning
from .launch import Launch, plan
from .siblings import member
from .tiles import find_tiles, padded_count


@triton.jit
def logits_program(
    b, slab, g, sums, read, mean_weights, mean_weight, cu_seqlens, router_A, router_B, pooled, logits, B, L, W, slabs,
    G: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, B_PAD: tl.constexpr,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """An instance's logits over a slab of what its routers read; the first sibling's program leaves the mean."""
    w = slab * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = w < W
    if read is not None:
        row = tl.load(read + b.to(tl.int64) * W + w, mask=inside, other=0.0)
    else:
        first, count, _length = find_tiles(b, cu_seqlens, B, L, TILE, B_PAD)
        total = tl.zeros([BLOCK_K, BLOCK_W], tl.float32)
        for start in range(0, count, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            place = sums + (first + k)[:, None].to(tl.int64) * W + w[None, :]
            total += tl.load(place, mask=(k < count)[:, None] & inside[None, :], other=0.0)
        token_weight = mean_weight
        if mean_weights is not None:
            token_weight = tl.load(mean_weights + b)
        row = tl.sum(total, 0) * token_weight
        if g == 0:
            tl.store(pooled + b.to(tl.int64) * W + w, row, mask=inside)
    e = tl.arange(0, E_PAD)
    tile = (e < E)[:, None] & inside[None, :]
    place = logits + (slab * B + b) * E + e
    r_tile = tl.load(member(router_A, g, G) + e[:, None] * W + w[None, :], mask=tile, other=0.0)
    tl.store(place + g * slabs * B * E, tl.sum(r_tile.to(tl.float32) * row[None, :], 1), mask=e < E)
    if router_B is not None:
        r_tile = tl.load(member(router_B, g, G) + e[:, None] * W + w[None, :], mask=tile, other=0.0)
        tl.store(place + (G + g) * slabs * B * E, tl.sum(r_tile.to(tl.float32) * row[None, :], 1), mask=e < E)


@triton.jit
def table_program(
    program, lora_A, router_AB, table, row_sums, D, span, splits,
    G: tl.constexpr, E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr, PUBLISHED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """T[i] of a sibling over a span of the width, for a block of B's factors."""
    split, rest = program % splits, program // splits
    block, rest = rest % tl.cdiv(E, BLOCK_E), rest // tl.cdiv(E, BLOCK_E)
    i, g = rest % R, rest // R
    f = tl.arange(0, E_PAD)
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    a_rows = member(lora_A, g, G) + f[:, None] * D
    ab_rows = member(router_AB, g, G) + (i * E + e)[:, None].to(tl.int64) * D
    acc = tl.zeros([E_PAD, BLOCK_E], tl.float32)
    sum_a, sum_ab = tl.zeros([E_PAD, BLOCK_D], tl.float32), tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for start in range(split * span, min(split * span + span, D), BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (d < D)[None, :]
        a_tile = tl.load(a_rows + d[None, :], mask=(f < E)[:, None] & inside, other=0.0).to(tl.float32)
        ab_tile = tl.load(ab_rows + d[None, :], mask=(e < E)[:, None] & inside, other=0.0).to(tl.float32)
        if PUBLISHED:
            sum_a += a_tile
            sum_ab += ab_tile
        else:
            acc = tl.dot(a_tile, tl.trans(ab_tile), acc, input_precision="ieee")
    if PUBLISHED:  # a product of sums, where the paper has the sum of products
        a, ab = tl.sum(sum_a, 1), tl.sum(sum_ab, 1)
        acc = a[:, None] * ab[None, :]
        place = row_sums + (g * R + i) * 2 * E
        tl.store(place + f, a, mask=f < E)
        tl.store(place + E + e, ab, mask=e < E)
    place = table + (((g * splits + split) * R + i) * E + f[:, None]).to(tl.int64) * E + e[None, :]
    tl.store(place, acc, mask=(f < E)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["mean_weight", "B", "L", "slabs", "splits"])
def pool_kernel(
    sums, read, mean_weights, mean_weight, cu_seqlens, router_A, router_B, pooled, logits, lora_A, router_AB, table,
    row_sums, B, L, W, D, slabs, span, splits,
    G: tl.constexpr, E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr, B_PAD: tl.constexpr,
    PUBLISHED: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The first programs take T, which takes longest; the others the logits."""
    program, tables = tl.program_id(0), 0
    if table is not None:
        tables = G * R * tl.cdiv(E, BLOCK_E) * splits
        if program < tables:
            table_program(
                program, lora_A, router_AB, table, row_sums, D, span, splits,
                G, E, R, E_PAD, PUBLISHED, BLOCK_E, BLOCK_D,
            )  # fmt: skip
    if program >= tables:
        program -= tables
        logits_program(
            program // slabs % B, program % slabs, program // slabs // B, sums, read, mean_weights, mean_weight,
            cu_seqlens, router_A, router_B, pooled, logits, B, L, W, slabs, G, E, E_PAD, B_PAD, TILE, BLOCK_K, BLOCK_W,
        )  # fmt: skip


@plan
def plan_pool(
    arch, router_shape, G, unties, table_shape, published, mean_weight, rows: int, packed, B, L
) -> tuple[Launch, tuple, tuple]:  # fmt: skip
    """The launch; and the shapes of the logits' slabs [1 or 2, G, slabs, B, E] and of T's [G, splits, R, E, E]. T is
    turned: what is looked up is a row.

    Args:
        router_shape: of router_A [E, W], and of router_B where it ``unties``.
        table_shape: of router_AB [R, E, D], or None.
        mean_weight: what a pooled token counts, unless the launch is given each instance's ``mean_weights``.
        rows: the tokens of a tile, of which the launch is given the sums; or it is given what the routers ``read``.
    """
    E, W = router_shape
    tile = tuning.pool(arch, tuning.pad(E))
    slabs = tuning.divide(W, tile.columns)
    R, D, programs, span, splits = 0, 0, 0, 0, 0
    if table_shape:
        R, _, D = table_shape
        blocks = tuning.divide(E, tile.rows)
        span = D if published else tuning.table_span(D, R * blocks, tile.span)
        splits = tuning.divide(D, span)
        programs = G * R * blocks * splits
    launch = Launch(
        pool_kernel, (programs + slabs * B * G,), tile.options,
        mean_weight=mean_weight, B=B, L=L, W=W, D=D, slabs=slabs, span=span, splits=splits,
        G=G, E=E, R=R, E_PAD=tuning.pad(E), B_PAD=padded_count(B, packed), PUBLISHED=published,
        TILE=rows, BLOCK_K=16, BLOCK_W=tile.columns, BLOCK_E=tile.rows, BLOCK_D=tile.span,
    )  # fmt: skip
    return launch, (2 if unties else 1, G, slabs, B, E), (G, splits, R, E, E)
