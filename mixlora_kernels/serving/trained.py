"""The model that an adapter was trained on, without its weights: it tells which weights the adapter has to bring."""

import copy

import torch
import transformers
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import PretrainedConfig, PreTrainedModel

from ..peft import ConditionalMixLoRAConfig
from ..peft.expected import tensors_to_come
from ..peft.files import Expected
from ..peft.targets import check_targets, choose_targets


def trained_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build transformers' model of a configuration on the meta device, which keeps shapes and dtypes alone.

    Args:
        config: it names the model's class in ``architectures``, as ``refusals.of_architecture`` demands.
        dtype: of the model's floating-point weights.
    """
    with torch.device("meta"):
        # A copy, because building a model writes into its configuration, which vLLM goes on using.
        return getattr(transformers, config.architectures[0])(copy.deepcopy(config)).to(dtype)


def weights_of(model: PreTrainedModel, config: ConditionalMixLoRAConfig) -> dict[str, Expected]:
    """The weights that an adapter of this configuration has in this model, by their names in a saved file, as PEFT
    finds them.

    Raises:
        ValueError: the model lacks a target, or a target is not a linear layer.
    """
    choose_targets(model, config)
    check_targets(model, config, check_target_module_exists)
    return tensors_to_come(model, config, check_target_module_exists)
