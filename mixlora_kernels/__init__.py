"""Conditional Mixture-of-LoRA (MixLoRA, ACL 2024), cheaper than plain LoRA."""

from . import reference
from .adapter import MixLoRAAdapter
from .config import MixLoRAConfig
from .functional import Factors, FrozenLinear, mixlora
from .linear import MixLoRALinear
from .routing import Routing, RoutingContext

__version__ = "0.1.0"
__all__ = [
    "Factors",
    "FrozenLinear",
    "MixLoRAAdapter",
    "MixLoRAConfig",
    "MixLoRALinear",
    "Routing",
    "RoutingContext",
    "mixlora",
    "reference",
]
