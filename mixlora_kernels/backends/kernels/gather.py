"""Sums over partial sums, always in the same order, without atomics.

Each chunk of tokens leaves a row of sums for each of its R slots. That a factor's gradient is the sum over the
slots that chose it is a product with a matrix of zeros and weights, built on the spot:

    out[e] = Σ_k selection[e, k] parts[k],      k = (chunk, slot),   selection[e, k] = weight_k where slot k chose e

A factor that nobody chose has a row of zeros there and gets an exact zero.
"""

import triton
import triton.language as tl

from .tiles import find_owner


@triton.jit
def gather_by_factor(
    parts, stride, owner, index, gate, scale, chunks, L, d, inside,
    R: tl.constexpr, E_PAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[E_PAD, BLOCK_D] from the columns ``d`` of parts [chunks, R], rows ``stride`` apart; the weight is
    scale · gate [B, R], or scale. A chunk whose ``owner`` is -1 left no sums."""
    factors = tl.arange(0, E_PAD)
    acc = tl.zeros([E_PAD, BLOCK_D], tl.float32)
    for first in range(0, chunks * R, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        there = k < chunks * R
        b = find_owner(tl.where(there, k // R, 0), owner, L, CHUNK)
        there &= b >= 0
        factor = tl.load(index + b * R + k % R, mask=there, other=-1)
        weight = scale
        if gate is not None:
            weight = scale * tl.load(gate + b * R + k % R, mask=there, other=0.0).to(tl.float32)[None, :]
        selection = tl.where(factors[:, None] == factor[None, :], weight, 0.0)  # [E_PAD, BLOCK_K]
        part = tl.load(
            parts + k[:, None].to(tl.int64) * stride + d[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_D]
        acc = tl.dot(selection, part, acc, input_precision="ieee")
    return acc
