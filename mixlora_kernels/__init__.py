"""Conditional Mixture-of-LoRA (MixLoRA, ACL 2024), cheaper than plain LoRA."""

from . import reference
from .adapter import MixLoRAAdapter
from .backends.base import Factors, FrozenLinear
from .config import MixLoRAConfig
from .linear import MixLoRALinear
from .op import mixlora, mixlora_siblings
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
    "mixlora_siblings",
    "reference",
]
