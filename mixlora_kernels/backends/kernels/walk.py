"""walk: the one pass over x and dx of the backward, all siblings at once.

    parts[g, chunk] = Σ_t du[g, t]ᵀ drop_g(x[t])                             from which dlora_A is gathered
    dx[t] += Σ_g drop_g(Σ_i du[g, t, i] lora_A[g][index_a[i]]) + pooled_t · spread[b]

A chunk is a span of tokens of one instance. Both sums meet in one walk because they need one mask of dropout, whose
draws cost more than the loads.
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .dropout import keep_tile
from .launch import Launch, plan
from .product import dot, dot_precision
from .rank_r import chosen_rows, slot_columns
from .tiles import count_tiles, find_rows, padded_count, row_tile


@triton.jit(do_not_specialize=["B", "L", "N", "dropped"])
def walk_kernel(
    x, dx, base, du, pools, index, spread, mask, seeds, cu_seqlens, parts, owner, B, L, N, D, stride_x, stride_dx,
    dropped,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, B_PAD: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``parts`` [G, chunks, R, D], or None with x; ``dx`` = ``base`` + update, both or ``base`` alone may be None."""
    chunk, start = row_tile(), tl.program_id(1) * BLOCK_D
    b, first, end = find_rows(chunk, cu_seqlens, B, L, CHUNK, B_PAD)
    if owner is not None and start == 0:
        tl.store(owner + chunk, b)
    if first < end:
        d = start + tl.arange(0, BLOCK_D)
        inside = d < D
        slots = tl.arange(0, R_PAD)
        sums = ()
        for _ in tl.static_range(G):
            sums = sums + (tl.zeros([R_PAD, BLOCK_D], tl.float32),)
        if spread is not None:
            spread_row = tl.load(spread + b.to(tl.int64) * D + d, mask=inside, other=0.0)
        for row in range(first, min(first + CHUNK, end), BLOCK_N):
            rows = row + tl.arange(0, BLOCK_N).to(tl.int64)
            live = rows < end
            tile = live[:, None] & inside[None, :]
            if parts is not None:
                x_tile = tl.load(x + rows[:, None] * stride_x + d[None, :], mask=tile, other=0.0)
            if dx is not None:
                update = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
                if base is not None:
                    update = tl.load(base + rows[:, None] * stride_dx + d[None, :], mask=tile, other=0.0).to(tl.float32)
                if spread is not None:
                    pooled = live
                    if mask is not None:
                        pooled = tl.load(mask + rows, mask=live, other=0) != 0
                    update += tl.where(pooled[:, None], spread_row[None, :], 0.0)
            added = ()
            for g in tl.static_range(G):
                du_tile = slot_columns(du + g * N.to(tl.int64) * R, rows, live, R, R_PAD)  # [BLOCK_N, R_PAD]
                if seeds is not None:
                    keep = keep_tile(seeds + g, rows, start, dropped, BLOCK_N, BLOCK_D)
                if parts is not None:
                    dropped_tile = x_tile
                    if seeds is not None:
                        dropped_tile = tl.where(keep, x_tile, 0.0)
                    du_turned = tl.trans(du_tile.to(x_tile.dtype))
                    added = added + (dot(du_turned, dropped_tile, sums[g], PRECISION),)
                if dx is not None:
                    kind = dx.dtype.element_ty
                    a_tile = chosen_rows(pools[g], index, (g * B + b).to(tl.int64), d, D, R, R_PAD)
                    step = dot(du_tile.to(kind), a_tile.to(kind), None, PRECISION)
                    if seeds is not None:
                        step = tl.where(keep, step, 0.0)
                    update += step
            if parts is not None:
                sums = added
            if dx is not None:
                tl.store(dx + rows[:, None] * stride_dx + d[None, :], update, mask=tile)
        if parts is not None:
            for g in tl.static_range(G):
                place = parts + ((g * tl.num_programs(0) + chunk).to(tl.int64) * R + slots[:, None]) * D + d[None, :]
                tl.store(place, sums[g], mask=(slots < R)[:, None] & inside[None, :])


def launch_walk(x, dx, overwrite: bool, du, pools, index, spread, mask, seeds, dropped: int, cu_seqlens, B, L, need_A):
    """dx in place; and ``parts`` [G, chunks, R, D], ``owner`` [chunks] or None, and a chunk's tokens."""
    (G, N, R), D, packed = du.shape, pools[0].shape[1], cu_seqlens is not None
    like = x if dx is None else dx
    launches, chunks, span = plan_walk(
        tuning.architecture(du.device), like.element_size(), G, N, R, D, packed, B, L, dropped,
        like.stride(0) if x is None else x.stride(0), like.stride(0), dot_precision(),
    )  # fmt: skip
    parts = du.new_empty(G, chunks, R, D) if need_A else None
    owner = du.new_empty(chunks, dtype=torch.int32) if packed and need_A else None
    for members, launch in launches:
        first, several = members.start == 0, len(launches) > 1
        own = [None if t is None else t[members] if several else t for t in (du, index, seeds, parts)]
        launch(
            du.device, x=x if need_A else None, dx=dx, base=None if overwrite and first else dx, du=own[0],
            pools=pools[members], index=own[1], spread=spread if first else None, mask=mask,
            seeds=own[2], cu_seqlens=cu_seqlens, parts=own[3], owner=owner,
        )  # fmt: skip
    return parts, owner, span


@plan
def plan_walk(
    arch, itemsize, G, N, R, D, packed, B, L, dropped, stride_x, stride_dx, precision
) -> tuple[list[tuple[slice, Launch]], int, int]:  # fmt: skip
    """The launches, each with the siblings that it serves; the chunks, and a chunk's tokens."""
    tile = tuning.walk(arch, N, D, tuning.pad(R), itemsize, bool(dropped))
    chunks = count_tiles(N, B, L, packed, tile.span)
    together = tuning.siblings(tuning.pad(R), draws=bool(dropped) and itemsize == 4 and arch != "interpreter")
    launches = []
    for g in range(0, G, together):
        launch = Launch(
            walk_kernel, (chunks, tuning.divide(D, tile.columns)), tile.options,
            B=B, L=L, N=N, D=D, stride_x=stride_x, stride_dx=stride_dx, dropped=dropped,
            G=min(together, G - g), R=R, R_PAD=tuning.pad(R), B_PAD=padded_count(B, packed),
            CHUNK=tile.span, BLOCK_N=tile.rows, BLOCK_D=tile.columns, PRECISION=precision,
        )  # fmt: skip
        launches.append((slice(g, g + together), launch))
    return launches, chunks, tile.span
