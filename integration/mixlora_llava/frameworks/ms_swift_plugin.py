"""MixLoRA as a tuner of ms-swift, without a change of ms-swift.

    MIXLORA_SETTINGS='{"r": 4, "num_factors": 16}' swift sft --tuner_type mixlora \\
        --external_plugins "$(mixlora --path ms_swift_plugin)" --model MODEL --dataset DATA ...

``MIXLORA_SETTINGS`` holds fields of ``ConditionalMixLoRAConfig`` as JSON; ms-swift's own arguments for LoRA do not
count. ms-swift imports this file by its path, before it parses what it trains.
"""

import json
import os

from peft import PeftModel, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from mixlora_kernels.peft import ConditionalMixLoRAConfig

NAME, VARIABLE = "mixlora", "MIXLORA_SETTINGS"


def read_settings() -> dict:
    """The adapter's settings from the environment; the paper's where there are none.

    Raises:
        ValueError: they are no JSON object.
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
    """Adapts the model; ms-swift's tuner for PEFT saves the adapter and loads it again."""

    @staticmethod
    def prepare_model(args, model: nn.Module) -> PeftModel:
        return get_peft_model(model, ConditionalMixLoRAConfig(task_type="CAUSAL_LM", **read_settings()))


tuners_map[NAME] = MixLoRATuner
