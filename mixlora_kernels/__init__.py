"""Conditional Mixture-of-LoRA (MixLoRA, ACL 2024): the layer, the operation, and the paper's equations."""

from . import reference
from .adapter import MixLoRAAdapter
from .backends.base import Factors, FrozenLinear
from .balance import balance_loss
from .config import MixLoRAConfig
from .linear import MixLoRALinear
from .op import mixlora, mixlora_siblings
from .routing import Routing, RoutingContext
from .versions import UntestedVersionWarning, __version__, warn_of_untested

warn_of_untested("torch", "triton")

__all__ = [
    "Factors",
    "FrozenLinear",
    "MixLoRAAdapter",
    "MixLoRAConfig",
    "MixLoRALinear",
    "Routing",
    "RoutingContext",
    "UntestedVersionWarning",
    "__version__",
    "balance_loss",
    "mixlora",
    "mixlora_siblings",
    "reference",
]
