"""decode: a kept routing and few tokens, in one launch: y += c Σ_i gate_i lora_B[index_b[i]] (lora_A[index_a[i]] · x).

Every program takes some columns of y and works out the r products for itself: to read r rows of lora_A once more
costs less than a second launch. Products and sums are float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...routing import Instances
from . import tuning
from .launch import as_rows, launch, register

FEW = (
    64  # tokens × slots up to which this beats project and expand: every program reads r rows of lora_A for each token
)


def decode(
    y: Tensor, x, lora_A, lora_B, index_a, index_b, gate, scale: float, instances: Instances, in_place: bool
) -> Tensor:
    """Add the update of x [N, D] to y [N, O], in place or not. It has no backward."""
    out = y if in_place else y.clone()
    decode_op(out, x, lora_A, lora_B, index_a, index_b, gate, scale, instances.segment, instances.length or 0)
    return out


@triton.jit(do_not_specialize=["scale", "L"])
def decode_kernel(
    y, x, lora_A, lora_B, index_a, index_b, gate, scale, segment, L, D, O, stride_y, stride_x,
    R: tl.constexpr, R_PAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    b = t // L if segment is None else tl.load(segment + t)
    slots = tl.arange(0, R_PAD)
    there = (slots < R)[:, None]
    row_a = tl.load(index_a + b * R + slots, mask=slots < R, other=0)
    row_b = tl.load(index_b + b * R + slots, mask=slots < R, other=0)
    weight = scale * tl.load(gate + b * R + slots, mask=slots < R, other=0.0).to(tl.float32)
    acc = tl.zeros([R_PAD, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x_row = tl.load(x + t * stride_x + d, mask=d < D, other=0.0).to(tl.float32)
        a_tile = tl.load(lora_A + row_a[:, None] * D + d[None, :], mask=there & (d < D)[None, :], other=0.0)
        acc += a_tile.to(tl.float32) * x_row[None, :]
    s = tl.sum(acc, 1) * weight  # [R_PAD]
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    b_tile = tl.load(lora_B + row_b[:, None] * O + o[None, :], mask=there & (o < O)[None, :], other=0.0)
    place = y + t * stride_y + o
    y_row = tl.load(place, mask=o < O, other=0.0).to(tl.float32)
    tl.store(place, y_row + tl.sum(s[:, None] * b_tile.to(tl.float32), 0), mask=o < O)


def fake_decode(y, x, lora_A, lora_B, index_a, index_b, gate, scale, segment, L):
    return None


def launch_decode(y, x, lora_A, lora_B, index_a, index_b, gate, scale, segment, L):
    x, (N, O), R = as_rows(x), y.shape, index_a.shape[1]
    tile = tuning.decode(tuning.architecture(y.device), R)
    launch(
        decode_kernel, (N, triton.cdiv(O, tile.columns)), y.device,
        y, x, lora_A.contiguous(), lora_B.contiguous(), index_a, index_b, gate, scale, segment, L,
        x.shape[1], O, y.stride(0), x.stride(0), R=R, R_PAD=triton.next_power_of_2(R),
        BLOCK_D=tile.span, BLOCK_O=tile.columns, **tile.options,
    )  # fmt: skip


decode_op = register(
    "decode(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, Tensor index_a, Tensor index_b, Tensor gate, "
    "float scale, Tensor? segment, SymInt L) -> ()",
    launch_decode,
    fake_decode,
)
