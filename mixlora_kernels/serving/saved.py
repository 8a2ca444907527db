"""Read an adapter's folder, which ``save_pretrained`` wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..peft import ConditionalMixLoRAConfig, ConditionalMixLoRAModel
from ..peft.config import PEFT_TYPE
from ..peft.files import Expected, check_fits, opened, without_prefix

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


def read_config(folder: str) -> ConditionalMixLoRAConfig:
    """Read an adapter's configuration.

    Raises:
        FileNotFoundError: the folder lacks the configuration or the weights.
        ValueError: it is not the configuration of a MixLoRA adapter.
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
    return config


def read_adapter(folder: str, config: ConditionalMixLoRAConfig, expected: Mapping[str, Expected]) -> SavedAdapter:
    """Read an adapter's weights.

    Args:
        folder: the adapter's folder.
        config: its configuration.
        expected: the weights that it has to bring (see ``trained.weights_of``).

    Raises:
        ValueError: a weight is missing or unknown, has another shape or dtype, or is not finite.
    """
    path = Path(folder)
    layers: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    with opened(path / SAFETENSORS_WEIGHTS_NAME) as file:
        given = without_prefix(file, "")
        check_fits(expected, given, path.name)
        for key, entry in given.items():
            layer, mark, name = key.rpartition(MARK)
            if mark:
                layers.setdefault(layer, {})[name] = entry.read().float()
            else:
                trained[key] = entry.read()
    if not layers:
        raise ValueError(f"{path / SAFETENSORS_WEIGHTS_NAME} holds no parameter of a MixLoRA adapter")
    return SavedAdapter(path, config, layers, trained)
