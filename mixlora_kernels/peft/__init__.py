"""Conditional Mixture-of-LoRA as a method of the peft library. The import registers it.

    from peft import get_peft_model
    from mixlora_kernels.peft import ConditionalMixLoRAConfig

    model = get_peft_model(model, ConditionalMixLoRAConfig(r=4, num_factors=16, task_type="CAUSAL_LM"))

Import it before ``PeftModel.from_pretrained`` loads an adapter of this method.
"""

from ..versions import warn_of_untested
from .config import PEFT_TYPE, ConditionalMixLoRAConfig
from .layer import MixLoRALayer
from .model import ConditionalMixLoRAModel
from .registration import check_hooks, register
from .report import plot_routing, routing_report
from .side_information import task_embedding

warn_of_untested("transformers", "peft", "accelerate", "trl")
check_hooks()
register(PEFT_TYPE, ConditionalMixLoRAConfig, ConditionalMixLoRAModel)

__all__ = [
    "ConditionalMixLoRAConfig",
    "ConditionalMixLoRAModel",
    "MixLoRALayer",
    "plot_routing",
    "routing_report",
    "task_embedding",
]
