"""Dropout of lora_A's input: the probability that is applied, and the seed that determines the mask.

The backward draws the mask again, so that no mask is stored. Each backend has its own random generator.
"""

import torch
from torch import Tensor

LEVELS = 1 << 16


def dropped_levels(p: float) -> int:
    """p as a number of steps of 1 / 65536: a 64-bit random number decides over four elements, with 16 bits each."""
    return min(round(p * LEVELS), LEVELS - 1)


def keep_scale(p: float) -> float:
    """1 / (1 - p) for the rounded p that is applied."""
    return 1.0 / (1.0 - dropped_levels(p) / LEVELS)


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """Draw seeds [count] int64 from torch's global generator, whose state activation checkpointing restores."""
    return torch.randint(1 << 62, (count,), device=device)
