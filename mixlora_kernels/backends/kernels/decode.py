"""decode: a given routing and few tokens, all siblings in one launch:

    y_g += c Σ_i gate_i lora_B[index_b[i]] (lora_A[index_a[i]] · x)

Every program takes some columns of a sibling's y and works out the r products for itself: to read r rows of lora_A
once more costs less than a second launch. Products and sums are float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad

from ...frozen import frozen_product
from ..base import FrozenLinear, Group
from . import tuning
from .launch import Launch, Op, as_pools, as_rows, plan
from .siblings import count_pieces, find_piece, member

# tokens × slots up to which this beats project and expand: every program reads r rows of lora_A for each token
MOST_PAIRS = 64


def decodes(group: Group) -> bool:
    """``Backend.decodes``. Not for forward-mode differentiation, which the kernel knows nothing of; ``Node`` refuses
    it."""
    if len(group.x) * group.options.r > MOST_PAIRS:
        return False
    read = [group.x, *(pool for own in group.factors for pool in (own.lora_A, own.lora_B))]
    if group.given is not None:
        read.append(group.given.gate)
    return all(forward_ad.unpack_dual(tensor).tangent is None for tensor in read)


def decode(group: Group) -> Sequence[Tensor]:
    """``Backend.decode``."""
    x, instances, routing = group.x, group.instances, group.given
    ys = [frozen_product(x, *base) if isinstance(base, FrozenLinear) else dense(base) for base in group.bases]
    DECODE.on(x)(
        ys, x, [own.lora_A for own in group.factors], [own.lora_B for own in group.factors], routing.index_a,
        routing.index_b, routing.gate, group.options.scale, instances.segment, instances.count, instances.length or 0,
    )  # fmt: skip
    return ys


def dense(y: Tensor) -> Tensor:
    """A copy in which the elements of a row are neighbours; a plain clone keeps the strides of a transposed tensor."""
    return y.clone(memory_format=torch.contiguous_format)


@triton.jit(do_not_specialize=["scale", "B", "L"])
def decode_kernel(
    ys, x, lora_A, lora_B, index_a, index_b, gate, scale, segment, B, L, D, widths, strides, stride_x,
    G: tl.constexpr, R: tl.constexpr, R_PAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    g, before, _ = find_piece(tl.program_id(1), widths, G, BLOCK_W)
    b = t // L if segment is None else tl.load(segment + t)
    row = (g * B + b) * R
    slots = tl.arange(0, R_PAD)
    there = (slots < R)[:, None]
    row_a = tl.load(index_a + row + slots, mask=slots < R, other=0)
    row_b = tl.load(index_b + row + slots, mask=slots < R, other=0)
    weight = scale * tl.load(gate + row + slots, mask=slots < R, other=0.0).to(tl.float32)
    pool = member(lora_A, g, G)
    acc = tl.zeros([R_PAD, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x_row = tl.load(x + t * stride_x + d, mask=d < D, other=0.0).to(tl.float32)
        a_tile = tl.load(pool + row_a[:, None] * D + d[None, :], mask=there & (d < D)[None, :], other=0.0)
        acc += a_tile.to(tl.float32) * x_row[None, :]
    s = tl.sum(acc, 1) * weight  # [R_PAD]
    W = member(widths, g, G)
    w = (tl.program_id(1) - before) * BLOCK_W + tl.arange(0, BLOCK_W)
    pool = member(lora_B, g, G)
    b_tile = tl.load(pool + row_b[:, None] * W + w[None, :], mask=there & (w < W)[None, :], other=0.0)
    place = member(ys, g, G) + t * member(strides, g, G) + w
    y_row = tl.load(place, mask=w < W, other=0.0).to(tl.float32)
    tl.store(place, y_row + tl.sum(s[:, None] * b_tile.to(tl.float32), 0), mask=w < W)


def allocate_decode(
    ys: Sequence[Tensor], x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], index_a: Tensor,
    index_b: Tensor, gate: Tensor, scale: float, segment: Tensor | None, B: int, L: int,
) -> None:  # fmt: skip
    """Nothing: it adds to ``ys``."""


def run_decode(ys, x, lora_A, lora_B, index_a, index_b, gate, scale, segment, B, L):
    x = as_rows(x)
    launch = plan_decode(
        tuning.architecture(x.device), *x.shape, B, L, index_a.shape[2], scale,
        x.stride(0), tuple([y.shape[1] for y in ys]), tuple([y.stride(0) for y in ys]),
    )  # fmt: skip
    launch(
        x.device, ys=tuple(ys), x=x, lora_A=as_pools(lora_A), lora_B=as_pools(lora_B),
        index_a=index_a, index_b=index_b, gate=gate, segment=segment,
    )  # fmt: skip


@plan
def plan_decode(arch, N, D, B, L, R, scale, stride_x, widths, strides) -> Launch:
    tile = tuning.decode(arch, R)
    return Launch(
        decode_kernel, (N, count_pieces(widths, tile.columns)), tile.options,
        scale=scale, B=B, L=L, D=D, widths=widths, strides=strides, stride_x=stride_x, G=len(widths), R=R,
        R_PAD=tuning.power_of_2(R), BLOCK_D=tile.span, BLOCK_W=tile.columns,
    )  # fmt: skip


DECODE = Op("decode", run_decode, allocate_decode, mutates=["ys"])
