"""decode: a kept routing and no gradient to come. project and expand in as few operations as it takes: a step of a few
tokens lasts hardly longer than it takes to start them."""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from ...routing import Instances

FEW = sys.maxsize  # tokens × slots up to which this serves: any number


def decode(
    y: Tensor, x, lora_A, lora_B, index_a, index_b, gate, scale: float, instances: Instances, in_place: bool
) -> Tensor:
    """Add the update of x [N, d_in] to y [N, d_out], in place or not."""
    u = F.linear(x, lora_A.to(x.dtype))  # [N, E]
    s = torch.zeros_like(u)
    moved = instances.by_token(u).gather(-1, instances.expand(index_a)) * instances.expand(gate)
    instances.by_token(s).scatter_(-1, instances.expand(index_b), moved.to(s.dtype))
    s, lora_B = s.to(y.dtype), lora_B.to(y.dtype)
    return y.addmm_(s, lora_B, alpha=scale) if in_place else torch.addmm(y, s, lora_B, alpha=scale)
