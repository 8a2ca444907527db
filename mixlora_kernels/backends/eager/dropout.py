"""Dropout of the input of lora_A without a stored mask and without an array of the size of x.

The tokens go by in blocks that stay in the cache. A block's mask comes from torch's own generator, seeded by
the call's seed and the block's number, so that the backward draws the forward's again. One 64-bit draw serves
four elements with 16 bits each: p is therefore rounded to 1/65536, and the scale corrected to match.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...dropout import LEVELS, dropped_levels

BLOCK = 64  # tokens whose elements one mask covers


def keep_blocks(seed: Tensor, x: Tensor, p: float) -> Iterator[tuple[slice, Tensor]]:
    """For each block of tokens of x [N, D] its rows, and 1 for its elements that are kept and 0 for the others,
    [rows, D] in x's dtype; valid until the next block."""
    N, D = x.shape
    start = int(seed)
    generator = torch.Generator(x.device)
    words = torch.empty(-(-BLOCK * D // 4), dtype=torch.int64, device=x.device)
    levels = words.view(torch.int16)[: BLOCK * D].view(BLOCK, D)
    keep = x.new_empty(BLOCK, D)  # not bool: the products that follow are several times faster in one dtype
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
    """drop(x) · lora_Aᵀ before the scale 1 / (1 - p): [N, d_in], [E, d_in] -> [N, E]."""
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
    """The gradient of lora_A [E, d_in], before the scale as well; that of x is added to dx."""
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
