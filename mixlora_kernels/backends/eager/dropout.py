"""Dropout of lora_A's input, without storing a mask and without an array of the size of x.

Tokens are processed in blocks that fit the CPU's cache. The mask of a block comes from torch's generator, seeded with
the call's seed plus the block's number, so that the backward draws the same mask as the forward. A 64-bit random number
decides over four elements, with 16 bits each. Therefore p is rounded to a multiple of 1/65536, and the scale 1 / (1 -
p) uses the rounded p.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...dropout import LEVELS, dropped_levels

BLOCK = 64  # tokens in a block


def keep_blocks(seed: Tensor, shape: tuple[int, int], p: float, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield for each block of tokens of the ``shape`` [N, D] its rows and its mask [rows, D], in the dtype and on the
    device of ``like``: 1 for elements that are kept, 0 for those that are dropped. The next block overwrites the mask.
    """
    N, D = shape
    start = int(seed)
    generator = torch.Generator(like.device)
    words = torch.empty(-(-BLOCK * D // 4), dtype=torch.int64, device=like.device)
    levels = words.view(torch.int16)[: BLOCK * D].view(BLOCK, D)
    keep = like.new_empty(BLOCK, D)  # this dtype, because a product with a bool mask is several times slower
    for number, first in enumerate(range(0, N, BLOCK)):
        rows = slice(first, min(first + BLOCK, N))
        words.random_(-(1 << 63), None, generator=generator.manual_seed(start + number))
        torch.ge(levels, dropped_levels(p) - LEVELS // 2, out=keep)
        yield rows, keep[: rows.stop - first]


def keep_mask(seed: Tensor, x: Tensor, p: float) -> Tensor:
    """The whole mask of x [N, D] in x's dtype, for the reference and the tests."""
    N, D = x.shape
    mask = torch.empty_like(x)
    for rows, keep in keep_blocks(seed, (N, D), p, x):
        mask[rows] = keep
    return mask


@torch.library.custom_op("mixlora_kernels::project_dropped", mutates_args=())
def project_dropped(x: Tensor, lora_A: Tensor, seed: Tensor, p: float) -> Tensor:
    """drop(x) · lora_Aᵀ without the scale 1 / (1 - p): [N, d_in], [E, d_in] -> [N, E]."""
    N, D = x.shape
    u = x.new_empty(N, lora_A.shape[0])
    block = x.new_empty(BLOCK, D)
    for rows, keep in keep_blocks(seed, (N, D), p, x):
        part = torch.mul(x[rows], keep, out=block[: len(keep)])
        torch.mm(part, lora_A.T, out=u[rows])
    return u


@project_dropped.register_fake
def _(x: Tensor, lora_A: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape[0], lora_A.shape[0])


@torch.library.custom_op("mixlora_kernels::project_dropped_backward", mutates_args={"dx"})
def project_dropped_backward(
    dx: Tensor | None, x: Tensor | None, du: Tensor, lora_A: Tensor, seed: Tensor, p: float
) -> Tensor:
    """Add x's gradient to dx if it is given, and return the gradient of lora_A [E, d_in] without the scale, which is
    zero if x is not given."""
    N, D = du.shape[0], lora_A.shape[1]
    dlora_A = du.new_zeros(lora_A.shape, dtype=torch.promote_types(du.dtype, torch.float32))
    block = du.new_empty(BLOCK, D)
    for rows, keep in keep_blocks(seed, (N, D), p, du):
        part = block[: len(keep)]
        if x is not None:
            torch.mul(x[rows], keep, out=part)
            dlora_A += du[rows].T @ part
        if dx is not None:
            dx[rows] += torch.mm(du[rows], lora_A, out=part).mul_(keep)
    return dlora_A


@project_dropped_backward.register_fake
def _(dx: Tensor | None, x: Tensor | None, du: Tensor, lora_A: Tensor, seed: Tensor, p: float) -> Tensor:
    return du.new_empty(lora_A.shape, dtype=torch.promote_types(du.dtype, torch.float32))
