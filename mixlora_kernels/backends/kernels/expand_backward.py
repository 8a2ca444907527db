"""expand's backward: one pass over every sibling's dy, then one launch that adds up what the pass had to split.

v[t, i] = lora_B[index_b[i]] · dy[t]               du[t, i] = c gate_i v[t, i]
m[i] = Σ_t u[t, index_a[i]] dy[t]                  dgate_i = c lora_B[index_b[i]] · m[i]
dlora_B[index_b[i]] += c gate_i m[i]

The program that has added up an instance's dgate goes on with it, back through the choice of factors (route.py).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...routing import Routing
from ..base import Group, Needs, Saved
from . import tuning
from .gather import gather_by_factor
from .launch import Launch, Op, as_pools, as_rows, plan
from .product import dot, dot_precision
from .rank_r import chosen_rows, slot_columns, slot_weights
from .route import gate_total, route_backward
from .siblings import count_pieces, find_piece, member
from .tiles import count_tiles, find_rows, find_tiles, padded_count, row_tile


def expand_backward(
    group: Group, dys: Sequence[Tensor], drouting, routing: Routing, saved: Saved, needs: Needs
) -> tuple[Sequence[Tensor | None], Tensor | None, Saved]:
    """``Stages.expand_backward``; what it carries is du [G, N, R], and the gradients of the logits [1 or 2, G, B, E]
    and of the looked-up rows of T [G, B, R, E], all float32, None where there are none."""
    instances, options, (chosen, _, kept, _) = group.instances, group.options, saved
    index_b = None if options.tied and group.given is None else routing.index_b  # a given routing may pair others
    du, *rest = EXPAND_BACKWARD.on(chosen)(
        dys, chosen, [own.lora_B for own in group.factors], routing.index_a, index_b, routing.gate, *drouting,
        routing.probs_a, routing.probs_b, kept, options.scale, options.gate, instances.cu_seqlens,
        instances.count, instances.length or 0, needs.lora_B, needs.gate, needs.routers,
    )  # fmt: skip
    dgate = rest.pop(0) if needs.gate else None
    dlogits = rest.pop(0) if needs.routers else None
    dlooked = rest.pop(0) if needs.routers and looks_up(kept) else None
    return (rest if needs.lora_B else [None] * len(dys)), dgate, (du, dlogits, dlooked)


def looks_up(kept: Tensor | None) -> bool:
    """Whether B's choice is conditioned on rows of T, of which ``route`` then kept the softmax."""
    return kept is not None and kept.shape[2] > 1


@triton.jit(do_not_specialize=["scale", "B", "L", "N"])
def expand_collect_kernel(
    dys, u, pools, index, gate, scale, cu_seqlens, planes, parts, dots, owner, B, L, N, widths, strides, total,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, B_PAD: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each chunk of tokens and piece of a sibling's columns:

    planes [pieces, N, R]: this piece's part of du;  parts [chunks, R, total width]: m;
    dots [pieces, chunks, R]: this piece's part of dgate;  owner [chunks]: the chunk's instance, or -1.
    """
    chunk, piece = row_tile(), tl.program_id(1)
    b, first, end = find_rows(chunk, cu_seqlens, B, L, CHUNK, B_PAD)
    if owner is not None and piece == 0:
        tl.store(owner + chunk, b)
    if first < end:
        g, before, offset = find_piece(piece, widths, G, BLOCK_W)
        W, dy, stride = member(widths, g, G), member(dys, g, G), member(strides, g, G)
        columns = (piece - before) * BLOCK_W + tl.arange(0, BLOCK_W)
        inside = columns < W
        slots = tl.arange(0, R_PAD)
        row = (g * B + b).to(tl.int64)
        b_tile = chosen_rows(member(pools, g, G), index, row, columns, W, R, R_PAD)
        b_turned = tl.trans(b_tile.to(dy.dtype.element_ty))  # [BLOCK_W, R_PAD]
        weight = slot_weights(gate, scale, row, R, R_PAD)
        acc = tl.zeros([R_PAD, BLOCK_W], tl.float32)
        for start in range(first, min(first + CHUNK, end), BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N).to(tl.int64)
            live = rows < end
            dy_tile = tl.load(
                dy + rows[:, None] * stride + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0
            )  # [BLOCK_N, BLOCK_W]
            v = dot(dy_tile, b_turned, None, PRECISION) * weight[None, :]  # [BLOCK_N, R_PAD]
            place = planes + (piece.to(tl.int64) * N + rows[:, None]) * R + slots[None, :]
            tl.store(place, v, mask=live[:, None] & (slots < R)[None, :])
            if parts is not None or dots is not None:
                u_tile = slot_columns(u + g.to(tl.int64) * N * R, rows, live, R, R_PAD)
                acc = dot(tl.trans(u_tile.to(dy_tile.dtype)), dy_tile, acc, PRECISION)
        if parts is not None:
            place = parts + (chunk.to(tl.int64) * R + slots[:, None]) * total + offset + columns[None, :]
            tl.store(place, acc, mask=(slots < R)[:, None] & inside[None, :])
        if dots is not None:
            product = scale * tl.sum(acc * b_tile.to(tl.float32), 1)
            tl.store(dots + (piece.to(tl.int64) * tl.num_programs(0) + chunk) * R + slots, product, mask=slots < R)


@triton.jit
def find_planes(sibling, widths, G: tl.constexpr, BLOCK: tl.constexpr):
    """The sibling's first piece, and the one after its last."""
    first, last, blocks = 0, 0, 0
    for g in tl.static_range(G):
        first = tl.where(sibling == g, blocks, first)
        blocks += tl.cdiv(widths[g], BLOCK)
        last = tl.where(sibling == g, blocks, last)
    return first, last


@triton.jit
def gather_pool(
    parts, owner, index, gate, scale, dlora_B, block, B, L, widths, total, chunks,
    G: tl.constexpr, E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of columns of one sibling's dlora_B."""
    g, before, offset = find_piece(block, widths, G, BLOCK_D)
    W = member(widths, g, G)
    d = (block - before) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = g.to(tl.int64) * B * R
    acc = gather_by_factor(
        parts + offset, total, owner, index + start, gate + start, scale, chunks, L, d, d < W,
        R, E_PAD, CHUNK, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    e = tl.arange(0, E_PAD)
    place = member(dlora_B, g, G) + e[:, None] * W + d[None, :]
    tl.store(place, acc, mask=(e < E)[:, None] & (d < W)[None, :])


@triton.jit
def gather_planes(
    planes, du, g, block, N, widths, G: tl.constexpr, R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of one sibling's du."""
    first, last = find_planes(g, widths, G, BLOCK_W)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N * R
    sums = tl.zeros([BLOCK], tl.float32)
    place = planes + first.to(tl.int64) * N * R + at
    for _ in range(first, last):
        sums += tl.load(place, mask=inside, other=0.0)
        place += N * R
    tl.store(du + g.to(tl.int64) * N * R + at, sums, mask=inside)


@triton.jit
def gather_dots(
    dots, g, b, cu_seqlens, B, L, widths, chunks,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, B_PAD: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dgate [R_PAD] of one instance of a sibling."""
    slots = tl.arange(0, R_PAD)
    plane, last = find_planes(g, widths, G, BLOCK_W)
    first, count, _length = find_tiles(b, cu_seqlens, B, L, CHUNK, B_PAD)
    sums = tl.zeros([BLOCK_K, R_PAD], tl.float32)
    for start in range(0, (last - plane) * count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        row = (plane + k // count).to(tl.int64) * chunks + first + k % count
        there = (k < (last - plane) * count)[:, None] & (slots < R)[None, :]
        sums += tl.load(dots + row[:, None] * R + slots[None, :], mask=there, other=0.0)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["scale", "B", "L", "N", "chunks", "columns", "blocks"])
def expand_gather_kernel(
    planes, parts, dots, owner, index, gate, scale, cu_seqlens, du, dlora_B, dgate,
    dgate_given, dprobs_a, dprobs_b, index_a, index_b, probs_a, probs_b, kept, dlogits, dlooked,
    B, L, N, widths, total, chunks, columns, blocks,
    G: tl.constexpr, E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr, R_PAD: tl.constexpr, B_PAD: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    TOTAL: tl.constexpr,
):  # fmt: skip
    """First ``columns`` programs for dlora_B, then ``blocks`` of each sibling for du, then G · B for dgate and for the
    way back through the choice of factors."""
    role = tl.program_id(0)
    if role < columns:
        if parts is not None:
            gather_pool(
                parts, owner, index, gate, scale, dlora_B, role, B, L, widths, total, chunks,
                G, E, R, E_PAD, CHUNK, BLOCK_K, BLOCK_D,
            )  # fmt: skip
    elif role < columns + blocks * G:
        own = role - columns
        gather_planes(planes, du, own // blocks, own % blocks, N, widths, G, R, BLOCK_W, BLOCK)
    else:
        row = role - columns - blocks * G
        slots = tl.arange(0, R_PAD)
        dchosen = tl.zeros([R_PAD], tl.float32)
        if dots is not None:
            dchosen = gather_dots(
                dots, row // B, row % B, cu_seqlens, B, L, widths, chunks,
                G, R, R_PAD, B_PAD, CHUNK, BLOCK_W, BLOCK_K,
            )  # fmt: skip
        place = row.to(tl.int64) * R + slots
        if dgate is not None:
            tl.store(dgate + place, dchosen, mask=slots < R)
        if dlogits is not None:
            if dgate_given is not None:
                dchosen += tl.load(dgate_given + place, mask=slots < R, other=0.0)
            route_backward(
                dchosen, dprobs_a, dprobs_b, index_a, index_b, probs_a, probs_b, kept, dlogits, dlooked, row, B,
                G, E, R, E_PAD, R_PAD, TOTAL,
            )  # fmt: skip


def allocate_expand_backward(
    dys: Sequence[Tensor], u: Tensor, lora_B: Sequence[Tensor], index_a: Tensor, index_b: Tensor | None,
    gate: Tensor, dgate: Tensor | None, dprobs_a: Tensor | None, dprobs_b: Tensor | None, probs_a: Tensor | None,
    probs_b: Tensor | None, kept: Tensor | None, scale: float, gate_kind: str,
    cu_seqlens: Tensor | None, B: int, L: int, need_B: bool, need_gate: bool, routes: bool,
) -> list[Tensor]:  # fmt: skip
    """du; as far as they are needed, dgate, dlogits, dlooked and the siblings' dlora_B."""
    (G, _, R), E = u.shape, lora_B[0].shape[0]
    outputs = [u.new_empty(u.shape)]
    if need_gate:
        outputs.append(u.new_empty(index_a.shape))
    if routes:
        outputs.append(u.new_empty(1 if index_b is None else 2, G, B, E))
        if looks_up(kept):
            outputs.append(u.new_empty(G, B, R, E))
    if need_B:
        outputs += [own.new_empty(own.shape) for own in as_pools(lora_B)]
    return outputs


def run_expand_backward(
    dys, u, lora_B, index_a, index_b, gate, dgate, dprobs_a, dprobs_b, probs_a, probs_b, kept, scale,
    gate_kind, cu_seqlens, B, L, need_B, need_gate, routes,
):  # fmt: skip
    outputs = allocate_expand_backward(
        dys, u, lora_B, index_a, index_b, gate, dgate, dprobs_a, dprobs_b, probs_a, probs_b, kept, scale, gate_kind,
        cu_seqlens, B, L, need_B, need_gate, routes,
    )  # fmt: skip
    du, *dlora_B = outputs
    dgate_out = dlora_B.pop(0) if need_gate else None
    dlogits = dlora_B.pop(0) if routes else None
    dlooked = dlora_B.pop(0) if routes and looks_up(kept) else None
    dys = tuple([as_rows(dy) for dy in dys])
    need_dots = need_gate or (routes and gate_kind != "binary")
    (_, N, R), E = u.shape, lora_B[0].shape[0]
    collect, gather, chunks, pieces, total = plan_expand_backward(
        tuning.architecture(u.device), dys[0].element_size(), u.shape, E, scale,
        cu_seqlens is not None, B, L, need_B, need_dots or routes, gate_total(gate_kind, R),
        tuple([dy.shape[1] for dy in dys]), tuple([dy.stride(0) for dy in dys]), dot_precision(),
    )  # fmt: skip
    between = {
        "planes": u.new_empty(pieces, N, R),
        "parts": u.new_empty(chunks, R, total) if need_B else None,
        "dots": u.new_empty(pieces, chunks, R) if need_dots else None,
        "owner": None if cu_seqlens is None else u.new_empty(chunks, dtype=torch.int32),
    }
    index = index_a if index_b is None else index_b
    collect(u.device, dys=dys, u=u, pools=as_pools(lora_B), index=index, gate=gate, cu_seqlens=cu_seqlens, **between)
    dgate, dprobs_a, dprobs_b = (None if t is None else t.contiguous() for t in (dgate, dprobs_a, dprobs_b))
    gather(
        u.device, index=index, gate=gate, cu_seqlens=cu_seqlens, du=du, dlora_B=tuple(dlora_B) or None,
        dgate=dgate_out, dgate_given=dgate, dprobs_a=dprobs_a, dprobs_b=dprobs_b, index_a=index_a, index_b=index_b,
        probs_a=probs_a, probs_b=probs_b, kept=kept, dlogits=dlogits, dlooked=dlooked, **between,
    )  # fmt: skip
    return outputs


@plan
def plan_expand_backward(
    arch, itemsize, u_shape, E, scale, packed, B, L, need_B, by_instance, gate_total, widths, strides, precision
) -> tuple[Launch, Launch, int, int, int]:  # fmt: skip
    """Both launches; and the chunks of tokens, the pieces of columns, and all siblings' columns."""
    G, N, R = u_shape
    tile = tuning.collect(arch, N, sum(widths), R, itemsize)
    chunks, pieces = count_tiles(N, B, L, packed, tile.span), count_pieces(widths, tile.columns)
    shared = {
        "scale": scale, "B": B, "L": L, "N": N, "widths": widths, "total": sum(widths), "G": G, "R": R,
        "R_PAD": tuning.pad(R), "B_PAD": padded_count(B, packed), "CHUNK": tile.span, "BLOCK_W": tile.columns,
    }  # fmt: skip
    collect = Launch(
        expand_collect_kernel, (chunks, pieces), tile.options,
        strides=strides, BLOCK_N=tile.rows, PRECISION=precision, **shared,
    )  # fmt: skip
    tile, block = tuning.gather(arch, tuning.pad(E)), 1024
    columns, blocks = count_pieces(widths, tile.columns) if need_B else 0, tuning.divide(N * R, block)
    gather = Launch(
        expand_gather_kernel, (columns + blocks * G + (B * G if by_instance else 0),), tile.options,
        chunks=chunks, columns=columns, blocks=blocks, E=E, E_PAD=tuning.pad(E), BLOCK=block,
        BLOCK_K=tile.rows, BLOCK_D=tile.columns, TOTAL=gate_total, **shared,
    )  # fmt: skip
    return collect, gather, chunks, pieces, sum(widths)


EXPAND_BACKWARD = Op("expand_backward", run_expand_backward, allocate_expand_backward)
