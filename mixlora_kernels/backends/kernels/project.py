"""project: u = drop(x) · lora_Aᵀ and what the routers make of the pooled tokens, in one pass over x; and back.

The routers' product commutes with the sum over an instance's pooled tokens, so a tile sums its rows of x first
(exactly: float32 sums of x's own values) and multiplies that one row with the routers, in float32 whatever x is.

    forward     u[t] = lora_A · drop(x[t])                    z[tile] = routers · Σ_t pooled_t x[t]
    backward    dx[t] += drop(Σ_i du[t, i] lora_A[index_a[i]]) + pooled_t (dzᵀ · routers)
                dlora_A[index_a[i]] += Σ_t du[t, i] drop(x[t])            drouters = Σ_b dz[b] (Σ_t pooled_t x[t])ᵀ

u is kept for the whole pool, because the choice of factors comes after it; du has the r chosen columns only.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...routing import Instances
from ..torch.dropout import dropped_levels
from . import tuning
from .dropout import keep_tile
from .gather import gather_by_factor, gather_by_instance, spread_by_instance
from .launch import as_rows, launch, register
from .product import dot, dot_precision
from .rank_r import add_kernel, collect_kernel
from .tiles import count_tiles, find_rows, padded_count


class Sums(NamedTuple):
    """The routers' products with the sums over each tile's pooled tokens."""

    planes: Tensor  # [S, tiles, 2E], to be added up over S
    rows: int  # tokens in a tile


def project(x: Tensor, lora_A: Tensor, routers: Tensor | None, instances: Instances, seed: Tensor | None, p: float):
    """u [S, N, E] float32, S planes to be added up, before the scale 1 / (1 - p).

    And, where ``routers`` [2E, D] is given, the ``Sums`` from which ``route`` takes the logits. The third result is
    what the backward needs of the means: nothing, it reads x anyway.
    """
    u, planes = project_op(
        x, lora_A, routers, instances.cu_seqlens, instances.mask if routers is not None else None, seed,
        instances.count, instances.length or 0, dropped_levels(p),
    )  # fmt: skip
    return u, (None if routers is None else Sums(planes, tuning.rows(x.shape[0]))), None


@triton.jit(do_not_specialize=["B", "L", "N", "tiles", "dropped"])
def project_kernel(
    x, lora_A, routers, cu_seqlens, mask, seed, u, sums, B, L, N, D, stride_x, tiles, span, dropped,
    E: tl.constexpr, E_PAD: tl.constexpr, Z_PAD: tl.constexpr, B_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    _, first, end = find_rows(tile, cu_seqlens, B, L, BLOCK_N, B_PAD)
    rows = first + tl.arange(0, BLOCK_N).to(tl.int64)
    live = rows < end
    factors = tl.arange(0, E_PAD)
    if routers is not None:
        z = tl.arange(0, Z_PAD)
        products = tl.zeros([Z_PAD, BLOCK_D], tl.float32)
        if mask is not None:
            pooled = tl.load(mask + rows, mask=live, other=0) != 0
    acc = tl.zeros([BLOCK_N, E_PAD], tl.float32)
    for start in range(split * span, min(split * span + span, D), BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < D
        x_tile = tl.load(x + rows[:, None] * stride_x + d[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        a_tile = tl.load(
            lora_A + factors[:, None] * D + d[None, :], mask=(factors < E)[:, None] & inside[None, :], other=0.0
        )  # [E_PAD, BLOCK_D]
        if routers is not None:
            read = x_tile.to(tl.float32)
            if mask is not None:  # chosen, not multiplied by 0: what stands in the padding may be infinite
                read = tl.where(pooled[:, None], read, 0.0)
            r_tile = tl.load(
                routers + z[:, None] * D + d[None, :], mask=(z < 2 * E)[:, None] & inside[None, :], other=0.0
            )  # [Z_PAD, BLOCK_D]
            products += r_tile.to(tl.float32) * tl.sum(read, 0)[None, :]
        if seed is not None:
            x_tile = tl.where(keep_tile(seed, rows, start, dropped, BLOCK_N, BLOCK_D), x_tile, 0.0)
        acc = dot(x_tile, tl.trans(a_tile.to(x_tile.dtype)), acc, PRECISION)
    tl.store(
        u + (split.to(tl.int64) * N + rows[:, None]) * E + factors[None, :],
        acc,
        mask=live[:, None] & (factors < E)[None, :],
    )
    if routers is not None:
        tl.store(sums + (split * tiles + tile) * 2 * E + z, tl.sum(products, 1), mask=z < 2 * E)


def _plan(x, lora_A, cu_seqlens, B, L):
    tile = tuning.project(tuning.architecture(x.device), *x.shape, tuning.pad(lora_A.shape[0]), x.element_size())
    D, packed = x.shape[1], cu_seqlens is not None
    span = tile.span or triton.cdiv(D, tile.columns) * tile.columns
    return tile, span, triton.cdiv(D, span), count_tiles(x.shape[0], B, L, packed, tile.rows)


def fake_project(x, lora_A, routers, cu_seqlens, mask, seed, B, L, dropped):
    _, _, splits, tiles = _plan(x, lora_A, cu_seqlens, B, L)
    E = lora_A.shape[0]
    u = x.new_empty(splits, x.shape[0], E, dtype=torch.float32)
    return u, x.new_empty(splits, 0 if routers is None else tiles, 2 * E, dtype=torch.float32)


def launch_project(x, lora_A, routers, cu_seqlens, mask, seed, B, L, dropped):
    x, lora_A, (N, D), E = as_rows(x), lora_A.contiguous(), x.shape, lora_A.shape[0]
    u, sums = fake_project(x, lora_A, routers, cu_seqlens, mask, seed, B, L, dropped)
    tile, span, splits, tiles = _plan(x, lora_A, cu_seqlens, B, L)
    launch(
        project_kernel, (tiles, splits), x.device,
        x, lora_A, routers, cu_seqlens, mask, seed, u, sums, B, L, N, D, x.stride(0), tiles, span, dropped,
        E=E, E_PAD=tuning.pad(E), Z_PAD=triton.next_power_of_2(2 * E),
        B_PAD=padded_count(B, cu_seqlens is not None), BLOCK_N=tile.rows, BLOCK_D=tile.columns,
        PRECISION=dot_precision(), **tile.options,
    )  # fmt: skip
    return u, sums


project_op = register(
    "project(Tensor x, Tensor lora_A, Tensor? routers, Tensor? cu_seqlens, Tensor? mask, Tensor? seed, "
    "SymInt B, SymInt L, int dropped) -> (Tensor, Tensor)",
    launch_project,
    fake_project,
)


def project_backward(
    dx, x, du, lora_A, index_a, dlogits, routers, pooled, instances: Instances, seed, p, need_x, need_A
):
    """The gradients of x [N, D], of lora_A [E, D] and of the routers [2E, D], None where there is none.

    Args:
        dx: what x's gradient is added to in place, or None.
        du: that of u, in the r chosen columns: [N, R].
        dlogits: that of the routers' products with the sums over pooled tokens [B, 2E], or None.
    """
    overwrite = dx is None
    if need_x and overwrite:
        dx = du.new_empty(du.shape[0], lora_A.shape[1])
    if not (need_x or need_A or dlogits is not None):
        return None, None, None
    dlora_A, drouters = project_backward_op(
        dx if need_x else None, x, du, lora_A, index_a, dlogits, routers, instances.cu_seqlens,
        instances.mask if dlogits is not None else None, seed, instances.count, instances.length or 0,
        dropped_levels(p), overwrite, need_A,
    )  # fmt: skip
    return dx, (dlora_A if need_A else None), (None if dlogits is None or x is None else drouters)


@triton.jit(do_not_specialize=["chunks", "B"])
def project_gather_kernel(
    parts, sums, owner, index_a, dlogits, routers, dlora_A, drouters, shares, chunks, B, D,
    E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr, Z_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add up the chunks: dlora_A by the factor each slot had chosen, drouters by dlogits. And shares [B, D], what each
    pooled token of an instance gets in its gradient: dlogits · routers."""
    start = tl.program_id(0) * BLOCK_D
    if parts is not None:
        gather_by_factor(parts, owner, index_a, None, 1.0, dlora_A, chunks, D, start, E, R, E_PAD, BLOCK_K, BLOCK_D)
    if sums is not None:
        gather_by_instance(sums, owner, dlogits, drouters, chunks, D, start, 2 * E, Z_PAD, BLOCK_K, BLOCK_D)
    if shares is not None:
        spread_by_instance(routers, dlogits, shares, B, D, start, 2 * E, Z_PAD, BLOCK_K, BLOCK_D)


def fake_project_backward(
    dx, x, du, lora_A, index_a, dlogits, routers, cu_seqlens, mask, seed, B, L, dropped, overwrite, need_A
):
    E, D = lora_A.shape
    dlora_A = lora_A.new_empty((E, D) if need_A and x is not None else (0,))
    rows = 0 if dlogits is None or x is None else 2 * E
    return dlora_A, lora_A.new_empty(rows, D, dtype=torch.float32)


def launch_project_backward(
    dx, x, du, lora_A, index_a, dlogits, routers, cu_seqlens, mask, seed, B, L, dropped, overwrite, need_A
):
    E, D, (N, R), packed = *lora_A.shape, du.shape, cu_seqlens is not None
    outputs = fake_project_backward(
        dx, x, du, lora_A, index_a, dlogits, routers, cu_seqlens, mask, seed, B, L, dropped, overwrite, need_A
    )
    arch, real = tuning.architecture(du.device), {"dtype": torch.float32}
    shared = {"K": R, "R": R, "R_PAD": tuning.pad(R), "B_PAD": padded_count(B, packed), "S": 1}
    shared["PRECISION"] = dot_precision()
    chunks, parts, sums, owner = 0, None, None, None
    if x is not None:
        x = as_rows(x)
        tile = tuning.collect(arch, N, D, tuning.pad(R), x.element_size())
        chunks = count_tiles(N, B, L, packed, tile.span)
        parts = du.new_empty(chunks, R, D, **real) if need_A else None
        sums = None if dlogits is None else du.new_empty(chunks, D, **real)
        owner = du.new_empty(chunks, dtype=torch.int32)
        launch(
            collect_kernel, (chunks, triton.cdiv(D, tile.columns)), du.device,
            x, du, None, None, 1.0, None, index_a, mask, seed, dropped, cu_seqlens, None, parts, None, sums, owner,
            B, L, N, D, x.stride(0), chunks, CHUNK=tile.span, BLOCK_N=tile.rows, BLOCK_W=tile.columns,
            **tile.options, **shared,
        )  # fmt: skip
    shares = None if dlogits is None or dx is None else du.new_empty(B, D, **real)
    if not (parts is None and sums is None and shares is None):
        tile = tuning.gather(arch, 2 * tuning.pad(E))
        launch(
            project_gather_kernel, (triton.cdiv(D, tile.columns),), du.device,
            parts, sums, owner, index_a, dlogits, routers, *outputs, shares, chunks, B, D,
            E=E, R=R, E_PAD=tuning.pad(E), Z_PAD=2 * tuning.pad(E), BLOCK_K=tile.rows, BLOCK_D=tile.columns,
            **tile.options,
        )  # fmt: skip
    if dx is not None:
        base, tile = None if overwrite else dx, tuning.add(arch, N, dx.element_size())
        launch(
            add_kernel, (count_tiles(N, B, L, packed, tile.rows), triton.cdiv(D, tile.columns)), du.device,
            dx, base, du, None, None, 1.0, lora_A.contiguous(), index_a, shares, mask, seed, dropped, cu_seqlens,
            B, L, N, D, dx.stride(0), dx.stride(0), BLOCK_N=tile.rows, BLOCK_W=tile.columns,
            **tile.options, **shared,
        )  # fmt: skip
    return outputs


project_backward_op = register(
    "project_backward(Tensor(a!)? dx, Tensor? x, Tensor du, Tensor lora_A, Tensor index_a, Tensor? dlogits, "
    "Tensor? routers, Tensor? cu_seqlens, Tensor? mask, Tensor? seed, SymInt B, SymInt L, int dropped, "
    "bool overwrite, bool need_A) -> (Tensor, Tensor)",
    launch_project_backward,
    fake_project_backward,
)
