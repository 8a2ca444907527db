"""Sums over partial sums, always in the same order, without atomics.

Each chunk of tokens leaves a row of sums for each of its R slots. That a factor's gradient is the sum over the
slots that chose it is a product with a matrix of zeros and weights, built on the spot:

    out[e] = Σ_k selection[e, k] parts[k],      k = (chunk, slot),   selection[e, k] = weight_k where slot k chose e

A factor that nobody chose has a row of zeros there and gets an exact zero.
"""

import triton
import triton.language as tl


@triton.jit
def gather_by_factor(
    parts, owner, index, gate, scale, out, chunks, D, start,
    E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [E, D] from parts [chunks, R, D], in columns ``start`` and on; the weight is scale · gate [B, R], or scale.

    ``owner`` [chunks] is the instance of each chunk, or -1 for a chunk without tokens, which left no sums.
    """
    d = start + tl.arange(0, BLOCK_D)
    factors = tl.arange(0, E_PAD)
    acc = tl.zeros([E_PAD, BLOCK_D], tl.float32)
    for first in range(0, chunks * R, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        b = tl.load(owner + k // R, mask=k < chunks * R, other=-1)
        there = b >= 0
        factor = tl.load(index + b * R + k % R, mask=there, other=-1)
        weight = scale
        if gate is not None:
            weight = scale * tl.load(gate + b * R + k % R, mask=there, other=0.0).to(tl.float32)[None, :]
        selection = tl.where(factors[:, None] == factor[None, :], weight, 0.0)  # [E_PAD, BLOCK_K]
        part = tl.load(
            parts + k[:, None].to(tl.int64) * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_D]
        acc = tl.dot(selection, part, acc, input_precision="ieee")
    tl.store(out + factors[:, None] * D + d[None, :], acc, mask=(factors < E)[:, None] & (d < D)[None, :])


@triton.jit
def gather_by_instance(
    parts, owner, weights, out, chunks, D, start,
    Z: tl.constexpr, Z_PAD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [Z, D] = Σ_k weights[owner_k]ᵀ parts[k], from weights [B, Z] and parts [chunks, D]."""
    d = start + tl.arange(0, BLOCK_D)
    z = tl.arange(0, Z_PAD)
    acc = tl.zeros([Z_PAD, BLOCK_D], tl.float32)
    for first in range(0, chunks, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        b = tl.load(owner + k, mask=k < chunks, other=-1)
        there = b >= 0
        weight = tl.load(weights + b[None, :] * Z + z[:, None], mask=there[None, :] & (z < Z)[:, None], other=0.0)
        part = tl.load(
            parts + k[:, None].to(tl.int64) * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_D]
        acc = tl.dot(weight, part, acc, input_precision="ieee")
    tl.store(out + z[:, None] * D + d[None, :], acc, mask=(z < Z)[:, None] & (d < D)[None, :])


@triton.jit
def spread_by_instance(
    rows, weights, out, B, D, start,
    Z: tl.constexpr, Z_PAD: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, D] = weights · rows, from weights [B, Z] and rows [Z, D]."""
    d = start + tl.arange(0, BLOCK_D)
    z = tl.arange(0, Z_PAD)
    row = tl.load(rows + z[:, None] * D + d[None, :], mask=(z < Z)[:, None] & (d < D)[None, :], other=0.0)
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        weight = tl.load(weights + b[:, None] * Z + z[None, :], mask=(b < B)[:, None] & (z < Z)[None, :], other=0.0)
        acc = tl.dot(weight, row.to(tl.float32), input_precision="ieee")  # [BLOCK_B, BLOCK_D]
        tl.store(out + b[:, None] * D + d[None, :], acc, mask=(b < B)[:, None] & (d < D)[None, :])
