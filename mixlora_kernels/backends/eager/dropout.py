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


def keep_blocks(seed: Tensor, x: Tensor, p: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield for each block of tokens of x [N, D] its rows and its mask [rows, D], in x's dtype: 1 for elements that are
    kept, 0 for those that are dropped. The next block overwrites the mask."""
    N, D = x.shape
    start = int(seed)
    generator = torch.Generator(x.device)
    words = torch.empty(-(-BLOCK * D // 4), dtype=torch.int64, device=x.device)
    levels = words.view(torch.int16)[: BLOCK * D].view(BLOCK, D)
    keep = x.new_empty(BLOCK, D)  # x's dtype, because a product with a bool mask is several times slower
    for number, first in enumerate(range(0, N, BLOCK)):
        rows = slice(first, min(first + BLOCK, N))
        words.random_(-(1 << 63), None, generator=generator.manual_seed(start + number))
        torch.ge(levels, dropped_levels(p) - LEVELS // 2, out=keep)
        yield rows, keep[: rows.stop - first]


def keep_mask(seed: Tensor, x: Tensor, p: float) -> Tensor:
    """The whole mask [N, D] in x's dtype, for the reference and the tests."""
    return torch.cat([keep.clone() for _, keep in keep_blocks(seed, x, p)])


@torch.library.custom_op("mixlora_kernels::project_dropped", mutates_args=())
def project_dropped(x: Tensor, lora_A: Tensor, seed: Tensor, p: float) -> Tensor:
    """drop(x) · lora_Aᵀ without the scale 1 / (1 - p): [N, d_in], [E, d_in] -> [N, E]."""
    u = x.new_empty(x.shape[0], lora_A.shape[0])
    block = x.new_empty(BLOCK, x.shape[1])
    for rows, keep in keep_blocks(seed, x, p):
        part = torch.mul(x[rows], keep, out=block[: len(keep)])
        torch.mm(part, lora_A.T, out=u[rows])
    return u


@project_dropped.register_fake
def _(x: Tensor, lora_A: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape[0], lora_A.shape[0])


@torch.library.custom_op("mixlora_kernels::project_dropped_backward", mutates_args={"dx"})
def project_dropped_backward(
    dx: Tensor | None, x: Tensor, du: Tensor, lora_A: Tensor, seed: Tensor, p: float
) -> Tensor:
    """Return the gradient of lora_A [E, d_in] without the scale, and add x's gradient to dx if it is given."""
    dlora_A = x.new_zeros(lora_A.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    block = x.new_empty(BLOCK, x.shape[1])
    for rows, keep in keep_blocks(seed, x, p):
        part = torch.mul(x[rows], keep, out=block[: len(keep)])
        dlora_A += du[rows].T @ part
        if dx is not None:
            dx[rows] += torch.mm(du[rows], lora_A, out=part).mul_(keep)
    return dlora_A


@project_dropped_backward.register_fake
def _(dx: Tensor | None, x: Tensor, du: Tensor, lora_A: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(lora_A.shape, dtype=torch.promote_types(x.dtype, torch.float32))
