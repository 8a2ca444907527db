"""The frozen product, which cuBLAS or oneDNN computes, and its part of x's gradient."""

import time
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import can_look

BLOCK_N, BLOCK_D = 320, 256  # a few MiB of float32 at a time, whatever the size of dy and of the weight


def frozen_product(x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
    """W x + bias with the bits of ``nn.Linear``, [N, d_in] -> [N, d_out]. With ``onto``: added to it in place.

    Under autocast x has another dtype than the weight or the bias. Each is cast to x's, as ``nn.Linear``'s are.
    """
    if weight.dtype is not x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    if onto is None:
        return F.linear(x, weight, bias)
    onto.addmm_(x, weight.T)
    return onto if bias is None else onto.add_(bias)


def frozen_product_backward(dy: Tensor, weight: Tensor, dx: Tensor | None = None) -> Tensor:
    """dx + dy · W, [N, d_out] -> [N, d_in], added in place to dx if it is given.

    On a CPU without a matrix unit for half precision, oneDNN multiplies half-precision matrices at about half the speed
    of float32 ones. There this function multiplies in float32, block by block, and rounds once.
    """
    half = dy.dtype in (torch.bfloat16, torch.float16)
    if half and weight.dtype == dy.dtype and can_look(dy) and single_is_faster(dy.dtype):
        out = dy.new_empty(dy.shape[0], weight.shape[1]) if dx is None else dx
        for columns in range(0, weight.shape[1], BLOCK_D):
            single = weight[:, columns : columns + BLOCK_D].float()
            for rows in range(0, len(dy), BLOCK_N):
                block = out[rows : rows + BLOCK_N, columns : columns + BLOCK_D]
                product = dy[rows : rows + BLOCK_N].float() @ single
                block.copy_(product if dx is None else product.add_(block))
        return out
    if weight.dtype is not dy.dtype:
        weight = weight.to(dy.dtype)
    return dy @ weight if dx is None else dx.addmm_(dy, weight)


@cache
def single_is_faster(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies float32 matrices at least 1.4 times as fast as matrices of ``dtype``.

    It is measured once, on a product of some milliseconds. On a CPU with a matrix unit for ``dtype``, float32 is
    several times slower.
    """

    def milliseconds(a: Tensor, b: Tensor) -> float:
        times = []
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        return 1e3 * min(times[1:])

    a, b = torch.ones(256, 1024), torch.ones(1024, 1024)
    return milliseconds(a.to(dtype), b.to(dtype)) > 1.4 * milliseconds(a, b)
