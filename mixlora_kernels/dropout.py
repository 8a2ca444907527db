"""Dropout of the input of lora_A: how often an element is dropped, and the seed that draws the mask.

The mask is drawn again in the backward and never stored; each backend has a generator of its own.
"""

import torch
from torch import Tensor

LEVELS = 1 << 16


def dropped_levels(p: float) -> int:
    """The probability p in steps of 1 / 65536, because one 64-bit draw serves four elements."""
    return min(round(p * LEVELS), LEVELS - 1)


def keep_scale(p: float) -> float:
    """1 / (1 - p), for the p that is really applied."""
    return 1.0 / (1.0 - dropped_levels(p) / LEVELS)


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """Seeds from torch's global generator, which activation checkpointing restores: [count] int64."""
    return torch.randint(1 << 62, (count,), device=device)
