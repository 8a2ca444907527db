"""An adapter's folder, as ``save_pretrained`` writes it."""

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
    """What a folder holds.

    Attributes:
        folder: its path.
        config: what the adapter computes.
        layers: by the path of an adapted layer in the trained model, its parameters by name, float32.
        trained: weights of modules that were trained in full (``modules_to_save``), by their name in the model.
    """

    folder: Path
    config: ConditionalMixLoRAConfig
    layers: dict[str, dict[str, Tensor]]
    trained: dict[str, Tensor]


def read_adapter(folder: str) -> SavedAdapter:
    """Read an adapter's folder.

    Raises:
        FileNotFoundError: it lacks the configuration or the weights.
        ValueError: they are not of a MixLoRA adapter, or do not fit each other, or hold numbers that are not finite.
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
    """What a file has to hold: for each layer that it speaks of all parameters, of the shapes that the configuration
    makes of its d_in and d_out; beside them weights of ``modules_to_save``."""
    expected = {}
    for layer in {key.rpartition(MARK)[0] for key in given if MARK in key}:
        # Where one is missing or has no dimension, 1 serves: the comparison will name it.
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
