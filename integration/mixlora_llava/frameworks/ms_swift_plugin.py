"""MixLoRA as a tuner of ms-swift. ms-swift itself is not changed.

    MIXLORA_SETTINGS='{"r": 4, "num_factors": 16}' swift sft --tuner_type mixlora \\
        --external_plugins "$(mixlora --path ms_swift_plugin)" --use_logits_to_keep false --model MODEL ...

``MIXLORA_SETTINGS`` contains fields of ``ConditionalMixLoRAConfig`` as JSON. ms-swift's own arguments for LoRA have no
effect. ms-swift imports this file by its path, before it parses its other arguments.
"""

import json
import os

from peft import PeftModel, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from mixlora_kernels.peft import ConditionalMixLoRAConfig

NAME, VARIABLE = "mixlora", "MIXLORA_SETTINGS"


def read_settings() -> dict:
    """Read the adapter's settings from the environment. By default they are the paper's.

    Raises:
        ValueError: the variable is not a JSON object.
    """
    text = os.environ.get(VARIABLE, "{}")
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{VARIABLE} must be JSON, got {text!r}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{VARIABLE} must be an object of settings, got {text!r}")
    return settings


class MixLoRATuner(PeftTuner):
    """Adapts the model. ms-swift's tuner for PEFT saves and loads the adapter."""

    @staticmethod
    def prepare_model(args, model: nn.Module) -> PeftModel:
        return get_peft_model(model, ConditionalMixLoRAConfig(task_type="CAUSAL_LM", **read_settings()))


tuners_map[NAME] = MixLoRATuner
