"""expand: y += scaling · s · lora_B, where s has the r chosen columns of u for the r chosen rows of lora_B; and back.

forward     y[t] += Σ_i c gate_i u[t, index_a[i]] · lora_B[index_b[i]]
backward    v[t, i] = lora_B[index_b[i]] · dy[t]                   du[t, i] = c gate_i v[t, i]
            m[i] = Σ_t u[t, index_a[i]] dy[t]                      dgate_i = c lora_B[index_b[i]] · m[i]
            dlora_B[index_b[i]] += c gate_i m[i]
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...routing import Instances
from . import tuning
from .gather import gather_by_factor
from .launch import as_rows, launch, register
from .product import dot_precision
from .rank_r import add_kernel, collect_kernel
from .tiles import count_tiles, find_tiles, padded_count


def expand(y: Tensor, u, lora_B, index_a, index_b, gate, scale: float, instances: Instances, in_place: bool):
    """Add the update to y [N, O], in place or not. Returns y, and for the backward u and the gate."""
    out = y if in_place else torch.empty_like(y, memory_format=torch.contiguous_format)
    expand_op(
        out, None if in_place else y, u, lora_B, index_a, index_b, gate, scale,
        instances.cu_seqlens, instances.count, instances.length or 0,
    )  # fmt: skip
    return out, None, u, gate


def fake_expand(y, base, u, lora_B, index_a, index_b, gate, scale, cu_seqlens, B, L):
    return None


def launch_expand(y, base, u, lora_B, index_a, index_b, gate, scale, cu_seqlens, B, L):
    (N, O), R, (S, _, E), packed = y.shape, index_a.shape[1], u.shape, cu_seqlens is not None
    base = y if base is None else as_rows(base)
    tile = tuning.add(tuning.architecture(y.device), N, y.element_size())
    launch(
        add_kernel, (count_tiles(N, B, L, packed, tile.rows), triton.cdiv(O, tile.columns)), y.device,
        y, base, u, index_a, gate, scale, lora_B.contiguous(), index_b, None, None, None, 0, cu_seqlens,
        B, L, N, O, y.stride(0), base.stride(0), K=E, R=R, R_PAD=tuning.pad(R), B_PAD=padded_count(B, packed), S=S,
        BLOCK_N=tile.rows, BLOCK_W=tile.columns, PRECISION=dot_precision(),
        **tile.options,
    )  # fmt: skip


expand_op = register(
    "expand(Tensor(a!) y, Tensor? base, Tensor u, Tensor lora_B, Tensor index_a, Tensor index_b, Tensor gate, "
    "float scale, Tensor? cu_seqlens, SymInt B, SymInt L) -> ()",
    launch_expand,
    fake_expand,
)


def expand_backward(
    dy: Tensor, chosen, u, lora_B, index_a, index_b, gate, scale: float, instances: Instances, need_B, need_gate
):
    """The gradients of u in its chosen columns [N, R], of lora_B [E, O] and of the gate [B, R]; None if not needed."""
    du, dlora_B, dgate = expand_backward_op(
        dy, u, lora_B, index_a, index_b, gate, scale, instances.cu_seqlens,
        instances.count, instances.length or 0, need_B, need_gate,
    )  # fmt: skip
    return du, (dlora_B if need_B else None), (dgate if need_gate else None)


@triton.jit(do_not_specialize=["scale", "B", "L", "N", "chunks", "pieces", "columns", "blocks"])
def expand_gather_kernel(
    planes, parts, dots, owner, index_b, gate, scale, cu_seqlens, du, dlora_B, dgate,
    B, L, N, O, chunks, pieces, columns, blocks,
    E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr, R_PAD: tl.constexpr, B_PAD: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Add up what was split: first ``columns`` programs for dlora_B, then ``blocks`` for du, then B for dgate."""
    role = tl.program_id(0)
    if role < columns:
        if parts is not None:
            gather_by_factor(
                parts, owner, index_b, gate, scale, dlora_B, chunks, O, role * BLOCK_O, E, R, E_PAD, BLOCK_K, BLOCK_O
            )
    elif role < columns + blocks:
        at = (role - columns).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        place = planes + at
        total = tl.zeros([BLOCK], tl.float32)
        for _ in range(pieces):
            total += tl.load(place, mask=at < N * R, other=0.0)
            place += N * R
        tl.store(du + at, total, mask=at < N * R)
    elif dots is not None:
        b = role - columns - blocks
        slots = tl.arange(0, R_PAD)
        first, count, _length = find_tiles(b, cu_seqlens, B, L, CHUNK, B_PAD)
        sums = tl.zeros([BLOCK_K, R_PAD], tl.float32)
        for start in range(0, pieces * count, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            row = (k // count) * chunks + first + k % count
            there = (k < pieces * count)[:, None] & (slots < R)[None, :]
            sums += tl.load(dots + row[:, None] * R + slots[None, :], mask=there, other=0.0)
        tl.store(dgate + b * R + slots, tl.sum(sums, 0), mask=slots < R)


def fake_expand_backward(dy, u, lora_B, index_a, index_b, gate, scale, cu_seqlens, B, L, need_B, need_gate):
    du = dy.new_empty(dy.shape[0], index_a.shape[1])
    dlora_B = lora_B.new_empty(lora_B.shape if need_B else (0,))
    return du, dlora_B, dy.new_empty(index_a.shape if need_gate else (0,), dtype=torch.float32)


def launch_expand_backward(dy, u, lora_B, index_a, index_b, gate, scale, cu_seqlens, B, L, need_B, need_gate):
    (N, O), R, (S, _, E), packed = dy.shape, index_a.shape[1], u.shape, cu_seqlens is not None
    outputs = fake_expand_backward(dy, u, lora_B, index_a, index_b, gate, scale, cu_seqlens, B, L, need_B, need_gate)
    dy, lora_B, arch = as_rows(dy), lora_B.contiguous(), tuning.architecture(dy.device)
    tile = tuning.collect(arch, N, O, tuning.pad(R), dy.element_size(), hands_on=True)
    chunks, pieces = count_tiles(N, B, L, packed, tile.span), triton.cdiv(O, tile.columns)
    planes = dy.new_empty(pieces, N, R, dtype=torch.float32)
    parts = dy.new_empty(chunks, R, O, dtype=torch.float32) if need_B else None
    dots = dy.new_empty(pieces, chunks, R, dtype=torch.float32) if need_gate else None
    owner = dy.new_empty(chunks, dtype=torch.int32)
    shared = {"R": R, "R_PAD": tuning.pad(R), "B_PAD": padded_count(B, packed), "CHUNK": tile.span}
    launch(
        collect_kernel, (chunks, pieces), dy.device,
        dy, u, index_a, gate, scale, lora_B, index_b, None, None, 0, cu_seqlens, planes, parts, dots, None, owner,
        B, L, N, O, dy.stride(0), chunks, K=E, S=S, BLOCK_N=tile.rows, BLOCK_W=tile.columns,
        PRECISION=dot_precision(), **tile.options, **shared,
    )  # fmt: skip
    tile, block = tuning.gather(arch, tuning.pad(E)), 1024
    columns, blocks = triton.cdiv(O, tile.columns) if need_B else 0, triton.cdiv(N * R, block)
    programs = columns + blocks + (B if need_gate else 0)
    launch(
        expand_gather_kernel, (programs,), dy.device,
        planes, parts, dots, owner, index_b, gate, scale, cu_seqlens, *outputs,
        B, L, N, O, chunks, pieces, columns, blocks, E=E, E_PAD=tuning.pad(E), BLOCK=block, BLOCK_K=tile.rows,
        BLOCK_O=tile.columns, **tile.options, **shared,
    )  # fmt: skip
    return outputs


expand_backward_op = register(
    "expand_backward(Tensor dy, Tensor u, Tensor lora_B, Tensor index_a, Tensor index_b, Tensor gate, float scale, "
    "Tensor? cu_seqlens, SymInt B, SymInt L, bool need_B, bool need_gate) -> (Tensor, Tensor, Tensor)",
    launch_expand_backward,
    fake_expand_backward,
)
