"""The two passes over an activation, of which project and expand are made. M is [N, W]: y, dy, x or dx.

All tokens of a tile have the same r factors. So a pass takes the r chosen rows of the pool, not the pool, and one
column of s for each slot; nothing is permuted.

    add        M[t] += s[t] · F_b               F_b [R, W]: the rows of the pool that the token's instance chose
    collect    parts[chunk] = Σ_t s[t]ᵀ M[t]    a chunk is a span of tokens of one instance
               v[t] = M[t] · F_bᵀ               in the same pass

``add`` is expand (M = y, s = weighted u, F of lora_B) and project's way back to x (M = dx, s = du, F of lora_A).
``collect`` is what each of them needs on the way back to the pools. Dropout multiplies what is added, or the M that
is summed; pooled tokens add a row of their own, ``shares``, or are summed into one, ``sums``.
"""

import triton
import triton.language as tl

from .dropout import keep_tile
from .product import dot
from .tiles import find_rows


@triton.jit
def slot_columns(s, pick, b, rows, live, N, K: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, S: tl.constexpr):
    """For each slot its column of s, whose S planes [N, K] are added up: the one that ``pick`` [B, R] names, or, where
    that is None, the slot's own: [BLOCK_N, R_PAD] in s's dtype."""
    slots = tl.arange(0, R_PAD)
    column = slots
    if pick is not None:
        column = tl.load(pick + b * R + slots, mask=slots < R, other=0)
    there = live[:, None] & (slots < R)[None, :]
    place = s + rows[:, None] * K + column[None, :]
    acc = tl.load(place, mask=there, other=0.0)
    for _ in range(1, S):
        place += N * K
        acc += tl.load(place, mask=there, other=0.0)
    return acc


@triton.jit
def slot_weights(gate, scale, b, R: tl.constexpr, R_PAD: tl.constexpr):
    slots = tl.arange(0, R_PAD)
    return scale * tl.load(gate + b * R + slots, mask=slots < R, other=0.0).to(tl.float32)


@triton.jit
def chosen_rows(pool, index, b, columns, W, R: tl.constexpr, R_PAD: tl.constexpr):
    """The rows of the pool [E, W] that an instance chose, [R_PAD, BLOCK_W]."""
    slots = tl.arange(0, R_PAD)
    row = tl.load(index + b * R + slots, mask=slots < R, other=0)
    there = (slots < R)[:, None] & (columns < W)[None, :]
    return tl.load(pool + row[:, None] * W + columns[None, :], mask=there, other=0.0)


@triton.jit(do_not_specialize=["scale", "B", "L", "N", "dropped"])
def add_kernel(
    out, base, s, pick, gate, scale, pool, index, shares, mask, seed, dropped, cu_seqlens,
    B, L, N, W, stride_out, stride_base,
    K: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, B_PAD: tl.constexpr, S: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [N, W] = base + s · F, where base may be out itself, or None for zeros."""
    b, first, end = find_rows(tl.program_id(0), cu_seqlens, B, L, BLOCK_N, B_PAD)
    if first < end:
        rows = first + tl.arange(0, BLOCK_N).to(tl.int64)
        live = rows < end
        start = tl.program_id(1) * BLOCK_W
        columns = start + tl.arange(0, BLOCK_W)
        tile = live[:, None] & (columns < W)[None, :]
        if base is not None:  # asked for first, needed last
            before = tl.load(base + rows[:, None] * stride_base + columns[None, :], mask=tile, other=0.0)
        s_tile = slot_columns(s, pick, b, rows, live, N, K, R, R_PAD, S)
        if gate is not None:
            s_tile *= slot_weights(gate, scale, b, R, R_PAD)[None, :]
        f_tile = chosen_rows(pool, index, b, columns, W, R, R_PAD)
        kind = out.dtype.element_ty
        added = dot(s_tile.to(kind), f_tile.to(kind), None, PRECISION)  # [BLOCK_N, BLOCK_W]
        if seed is not None:
            added = tl.where(keep_tile(seed, rows, start, dropped, BLOCK_N, BLOCK_W), added, 0.0)
        if shares is not None:
            share = tl.load(shares + b * W + columns, mask=columns < W, other=0.0)
            pooled = live
            if mask is not None:
                pooled = tl.load(mask + rows, mask=live, other=0) != 0
            added += tl.where(pooled[:, None], share[None, :], 0.0)
        if base is not None:
            added += before.to(tl.float32)
        tl.store(out + rows[:, None] * stride_out + columns[None, :], added, mask=tile)


@triton.jit(do_not_specialize=["scale", "B", "L", "N", "chunks", "dropped"])
def collect_kernel(
    m, s, pick, gate, scale, pool, index, mask, seed, dropped, cu_seqlens, planes, parts, dots, sums, owner,
    B, L, N, W, stride_m, chunks,
    K: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, B_PAD: tl.constexpr, S: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each chunk of tokens and slice of the width, whatever is asked for:

    parts [chunks, R, W]: Σ_t s[t]ᵀ m[t];  planes [W / BLOCK_W, N, R]: this slice's part of weight · v;
    dots [W / BLOCK_W, chunks, R]: of scale · Σ_t s[t] v[t];  sums [chunks, W]: the sum of the pooled rows of m;
    owner [chunks]: the chunk's instance, or -1 for a chunk without tokens, which leaves nothing else.
    """
    chunk, piece = tl.program_id(0), tl.program_id(1)
    b, first, end = find_rows(chunk, cu_seqlens, B, L, CHUNK, B_PAD)
    if piece == 0:
        tl.store(owner + chunk, b)
    if first < end:
        start = piece * BLOCK_W
        columns = start + tl.arange(0, BLOCK_W)
        inside = columns < W
        slots = tl.arange(0, R_PAD)
        if pool is not None:
            f_tile = chosen_rows(pool, index, b, columns, W, R, R_PAD)
            f_turned = tl.trans(f_tile.to(m.dtype.element_ty))  # [BLOCK_W, R_PAD]
            weight = slot_weights(gate, scale, b, R, R_PAD)
        acc = tl.zeros([R_PAD, BLOCK_W], tl.float32)
        total = tl.zeros([BLOCK_W], tl.float32)
        for row in range(first, min(first + CHUNK, end), BLOCK_N):
            rows = row + tl.arange(0, BLOCK_N).to(tl.int64)
            live = rows < end
            m_tile = tl.load(
                m + rows[:, None] * stride_m + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0
            )  # [BLOCK_N, BLOCK_W]
            if pool is not None:
                v = dot(m_tile, f_turned, None, PRECISION) * weight[None, :]  # [BLOCK_N, R_PAD]
                place = planes + (piece.to(tl.int64) * N + rows[:, None]) * R + slots[None, :]
                tl.store(place, v, mask=live[:, None] & (slots < R)[None, :])
            if sums is not None:
                read = m_tile.to(tl.float32)
                if mask is not None:  # chosen, not multiplied by 0: what stands in the padding may be infinite
                    pooled = tl.load(mask + rows, mask=live, other=0) != 0
                    read = tl.where(pooled[:, None], read, 0.0)
                total += tl.sum(read, 0)
            if parts is not None or dots is not None:
                if seed is not None:
                    m_tile = tl.where(keep_tile(seed, rows, start, dropped, BLOCK_N, BLOCK_W), m_tile, 0.0)
                s_tile = slot_columns(s, pick, b, rows, live, N, K, R, R_PAD, S).to(m_tile.dtype)
                acc = dot(tl.trans(s_tile), m_tile, acc, PRECISION)
        if parts is not None:
            place = parts + (chunk.to(tl.int64) * R + slots[:, None]) * W + columns[None, :]
            tl.store(place, acc, mask=(slots < R)[:, None] & inside[None, :])
        if dots is not None:
            product = scale * tl.sum(acc * f_tile.to(tl.float32), 1)
            tl.store(dots + (piece * chunks + chunk) * R + slots, product, mask=slots < R)
        if sums is not None:
            tl.store(sums + chunk.to(tl.int64) * W + columns, total, mask=inside)
