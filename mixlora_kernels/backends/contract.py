"""What the differentiable operation and a backend say to one another, beside tensors."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The parameters of one adapter, or their gradients; a router is None where the configuration has none."""

    lora_A: Tensor  # [E, d_in]
    lora_B: Tensor  # [E, d_out]
    router_A: Tensor | None  # [E, d_route]
    router_B: Tensor | None  # [E, d_route]
    router_AB: Tensor | None  # [r, E, d_in]


class Options(NamedTuple):
    """What a backend needs to know beside tensors."""

    r: int
    scale: float  # scaling, and the 1 / (1 - p) of dropout
    p: float
    gate: str
    conditioning: str | None  # "factors" or "published"; None: no table
    tied: bool  # whether B takes A's choice
    pools: bool  # whether the routers read x
    dtype: torch.dtype  # x's
    backend: ModuleType


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    lora_A: bool
    lora_B: bool
    routers: bool  # all of them, and the pooled embedding of task routing
    gate: bool
