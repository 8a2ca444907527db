"""decode: a kept routing and no gradient to come: project and expand with nothing kept for a backward."""

import sys

from torch import Tensor

from ...routing import Instances
from .expand import expand
from .project import project

FEW = sys.maxsize  # tokens × slots up to which this serves: any number


def decode(
    y: Tensor, x, lora_A, lora_B, index_a, index_b, gate, scale: float, instances: Instances, in_place: bool
) -> Tensor:
    """Add the update of x [N, d_in] to y [N, d_out], in place or not."""
    u, _, _ = project(x, lora_A, None, instances, None, 0.0)
    return expand(y, u, lora_B, index_a, index_b, gate, scale, instances, in_place)[0]
