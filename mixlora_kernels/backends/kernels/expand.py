"""expand: y_g[t] += Σ_i c gate_i u[g, t, index_a[i]] · lora_B[index_b[i]] (Equations 1 and 9), one launch for all.

The first block of a sibling's columns leaves the r chosen columns of u, which is all that the backward needs of it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...routing import Routing
from ..base import Group, Saved
from . import tuning
from .launch import Launch, Op, as_pools, as_rows, plan
from .product import dot, dot_precision
from .rank_r import chosen_rows, slot_weights
from .siblings import count_pieces, find_piece, member
from .tiles import count_tiles, find_rows, padded_count, row_tile


def expand(
    group: Group, ys: Sequence[Tensor] | None, fresh: Sequence[bool], routing: Routing, saved: Saved
) -> tuple[Sequence[Tensor], Saved]:
    """``Stages.expand``; in the place of u it leaves its chosen columns [G, N, R] float32."""
    (u, *rest), instances = saved, group.instances
    # A graph being compiled knows no operation in place.
    in_place = ys is not None and all(fresh) and not torch.compiler.is_compiling()
    if ys is None:
        outs, bases = [group.x.new_empty(len(group.x), own.lora_B.shape[1]) for own in group.factors], []
    elif in_place:
        outs, bases = ys, ys
    else:
        outs, bases = [torch.empty_like(y, memory_format=torch.contiguous_format) for y in ys], ys
    chosen = EXPAND.on(group.x)(
        outs, [] if in_place else bases, u, [own.lora_B for own in group.factors], routing.index_a, routing.index_b,
        routing.gate, group.options.scale, instances.cu_seqlens, instances.count, instances.length or 0, in_place,
    )  # fmt: skip
    return outs, (chosen, *rest)


@triton.jit(do_not_specialize=["scale", "B", "L", "N"])
def expand_kernel(
    outs, bases, u, pools, index_a, index_b, gate, chosen, scale, cu_seqlens, B, L, N, widths,
    out_strides, base_strides,
    G: tl.constexpr, E: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, B_PAD: tl.constexpr, S: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """out = base + update; without bases, out is what it is added to, or, unless it ``ADDS``, the update alone."""
    b, first, end = find_rows(row_tile(), cu_seqlens, B, L, BLOCK_N, B_PAD)
    if first < end:
        rows = first + tl.arange(0, BLOCK_N).to(tl.int64)
        live = rows < end
        g, piece, _ = find_piece(tl.program_id(1), widths, G, BLOCK_W)
        piece = tl.program_id(1) - piece
        W = member(widths, g, G)
        columns = piece * BLOCK_W + tl.arange(0, BLOCK_W)
        tile = live[:, None] & (columns < W)[None, :]
        out = member(outs, g, G) + rows[:, None] * member(out_strides, g, G) + columns[None, :]
        base = out
        if bases is not None:
            base = member(bases, g, G) + rows[:, None] * member(base_strides, g, G) + columns[None, :]
        if ADDS:
            before = tl.load(base, mask=tile, other=0.0).to(tl.float32)  # asked for first, needed last
        row = (g * B + b).to(tl.int64)
        slots = tl.arange(0, R_PAD)
        column = tl.load(index_a + row * R + slots, mask=slots < R, other=0)
        there = live[:, None] & (slots < R)[None, :]
        place = u + (g.to(tl.int64) * S * N + rows[:, None]) * E + column[None, :]
        u_tile = tl.load(place, mask=there, other=0.0)
        for _ in range(1, S):
            place += N.to(tl.int64) * E
            u_tile += tl.load(place, mask=there, other=0.0)
        if piece == 0:
            tl.store(chosen + (g.to(tl.int64) * N + rows[:, None]) * R + slots[None, :], u_tile, mask=there)
        s_tile = u_tile * slot_weights(gate, scale, row, R, R_PAD)[None, :]
        b_tile = chosen_rows(member(pools, g, G), index_b, row, columns, W, R, R_PAD)
        kind = member(outs, g, G).dtype.element_ty
        added = dot(s_tile.to(kind), b_tile.to(kind), None, PRECISION)  # [BLOCK_N, BLOCK_W]
        if ADDS:
            added += before
        tl.store(out, added, mask=tile)


def allocate_expand(
    outs: Sequence[Tensor], bases: Sequence[Tensor], u: Tensor, lora_B: Sequence[Tensor], index_a: Tensor,
    index_b: Tensor, gate: Tensor, scale: float, cu_seqlens: Tensor | None, B: int, L: int, in_place: bool,
) -> Tensor:  # fmt: skip
    """u's chosen columns."""
    return u.new_empty(u.shape[0], u.shape[2], index_a.shape[2])


def run_expand(outs, bases, u, lora_B, index_a, index_b, gate, scale, cu_seqlens, B, L, in_place):
    chosen = allocate_expand(outs, bases, u, lora_B, index_a, index_b, gate, scale, cu_seqlens, B, L, in_place)
    bases = tuple([as_rows(base) for base in bases]) or None
    launch = plan_expand(
        tuning.architecture(u.device), outs[0].element_size(), u.shape, index_a.shape[2], scale, cu_seqlens is not None,
        B, L, tuple([out.shape[1] for out in outs]), tuple([out.stride(0) for out in outs]),
        bases and tuple([base.stride(0) for base in bases]), in_place or bases is not None, dot_precision(),
    )  # fmt: skip
    launch(
        u.device, outs=tuple(outs), bases=bases, u=u, pools=as_pools(lora_B), index_a=index_a, index_b=index_b,
        gate=gate, chosen=chosen, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return chosen


@plan
def plan_expand(
    arch, itemsize, u_shape, R, scale, packed, B, L, widths, out_strides, base_strides, adds, precision
) -> Launch:  # fmt: skip
    G, S, N, E = u_shape
    tile = tuning.add(arch, N, R, itemsize)
    return Launch(
        expand_kernel, (count_tiles(N, B, L, packed, tile.rows), count_pieces(widths, tile.columns)), tile.options,
        scale=scale, B=B, L=L, N=N, widths=widths, out_strides=out_strides, base_strides=base_strides,
        G=G, E=E, R=R, R_PAD=tuning.pad(R), B_PAD=padded_count(B, packed), S=S,
        BLOCK_N=tile.rows, BLOCK_W=tile.columns, PRECISION=precision, ADDS=adds,
    )  # fmt: skip


EXPAND = Op("expand", run_expand, allocate_expand, mutates=["outs"])
