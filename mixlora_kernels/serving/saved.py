"""Read an adapter's folder, which ``save_pretrained`` wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..adapter import MixLoRAAdapter
from ..peft import ConditionalMixLoRAConfig, ConditionalMixLoRAModel
from ..peft.config import PEFT_TYPE
from ..peft.files import Expected, Given, check_fits, opened, without_prefix

MARK = f".{ConditionalMixLoRAModel.prefix}adapter."


class SavedAdapter(NamedTuple):
    """The contents of an adapter's folder.

    Attributes:
        folder: its path.
        config: the adapter's configuration.
        layers: the parameters of each adapted layer by name, float32, by the layer's path in the trained model.
        trained: the weights of modules that were trained in full (``modules_to_save``), by their names in the model.
    """

    folder: Path
    config: ConditionalMixLoRAConfig
    layers: dict[str, dict[str, Tensor]]
    trained: dict[str, Tensor]


def read_adapter(folder: str) -> SavedAdapter:
    """Read an adapter's folder.

    Raises:
        FileNotFoundError: the folder lacks the configuration or the weights.
        ValueError: they do not belong to a MixLoRA adapter or do not fit each other, or a weight is not finite.
    """
    path = Path(folder)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path} has no {name}: give the folder that save_pretrained wrote as "
                'model_loader_extra_config={"adapter": FOLDER}'
            )
    config = ConditionalMixLoRAConfig.from_pretrained(str(path))
    if not isinstance(config, ConditionalMixLoRAConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"{path} holds an adapter of the kind {kind}, load_format='mixlora' serves {PEFT_TYPE.value}: serve others "
            "with vLLM's own --enable-lora"
        )
    layers: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    with opened(path / SAFETENSORS_WEIGHTS_NAME) as file:
        given = without_prefix(file, "")
        check_fits(expected_of(given, config), given, path.name)
        for key, entry in given.items():
            layer, mark, name = key.rpartition(MARK)
            if mark:
                layers.setdefault(layer, {})[name] = entry.read().float()
            else:
                trained[key] = entry.read()
    if not layers:
        raise ValueError(f"{path / SAFETENSORS_WEIGHTS_NAME} holds no parameter of a MixLoRA adapter")
    return SavedAdapter(path, config, layers, trained)


def expected_of(given: Mapping[str, Given], config: ConditionalMixLoRAConfig) -> dict[str, Expected]:
    """The tensors that a file of weights has to hold: all parameters of each layer that it names, in the shapes that
    follow from the configuration and the layer's d_in and d_out; and the weights of ``modules_to_save``."""
    expected = {}
    for layer in {key.rpartition(MARK)[0] for key in given if MARK in key}:
        # If lora_A or lora_B is missing or has no dimensions, use 1: the comparison will name it.
        d_in, d_out = (
            given[key].shape[-1] if (key := f"{layer}{MARK}{name}") in given and given[key].shape else 1
            for name in ("lora_A", "lora_B")
        )
        for name, parameter in MixLoRAAdapter(d_in, d_out, config, device="meta").named_parameters():
            expected[f"{layer}{MARK}{name}"] = Expected(tuple(parameter.shape))
    modules = tuple(f".{module}." for module in config.modules_to_save or ())
    for key, entry in given.items():
        if MARK not in key and any(module in f".{key}" for module in modules):
            dtype = entry.dtype if isinstance(entry.dtype, torch.dtype) else torch.int64
            expected[key] = Expected(None, dtype, own=False)
    return expected
