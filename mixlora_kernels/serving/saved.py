"""An adapter's folder, as ``save_pretrained`` writes it."""

from pathlib import Path
from typing import NamedTuple

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from ..peft import ConditionalMixLoRAConfig, ConditionalMixLoRAModel
from ..peft.config import PEFT_TYPE

MARK = f".{ConditionalMixLoRAModel.prefix}adapter."
WRAPPER = "base_model.model."  # what a PeftModel adds before a name; transformers' own save_pretrained does not
NAMES = ("lora_A", "lora_B", "router_A", "router_B", "router_AB")


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
        ValueError: they are not of a MixLoRA adapter, or do not fit each other.
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
    for key, tensor in load_file(path / SAFETENSORS_WEIGHTS_NAME).items():
        layer, mark, name = key.removeprefix(WRAPPER).rpartition(MARK)
        if mark:
            layers.setdefault(layer, {})[name] = tensor.float()
        else:
            trained[check_trained(key.removeprefix(WRAPPER), config)] = tensor
    for layer, parameters in layers.items():
        check_shapes(layer, parameters, config)
    if not layers:
        raise ValueError(f"{path / SAFETENSORS_WEIGHTS_NAME} holds no parameter of a MixLoRA adapter")
    return SavedAdapter(path, config, layers, trained)


def check_trained(name: str, config: ConditionalMixLoRAConfig) -> str:
    """The name of a weight that is not the adapter's, which has to be in a module that was trained in full.

    Raises:
        ValueError: it is not, and would replace a frozen weight.
    """
    saved = config.modules_to_save or []
    if not any(f".{module}." in f".{name}" for module in saved):
        raise ValueError(
            f"the adapter brings {name}, which is neither a parameter of an adapter nor in modules_to_save={saved}: "
            "it would replace a weight of the frozen model"
        )
    return name


def check_shapes(layer: str, parameters: dict[str, Tensor], config: ConditionalMixLoRAConfig) -> None:
    """Compare a layer's parameters with what its configuration makes of them, beside d_in and d_out.

    Raises:
        ValueError: one is missing, unknown, or of another shape.
    """
    from ..adapter import MixLoRAAdapter

    if not {"lora_A", "lora_B"} <= parameters.keys() or parameters["lora_A"].dim() != 2:
        raise ValueError(f"{layer}: needs lora_A [E, d_in] and lora_B [E, d_out], got {sorted(parameters)}")
    d_in, d_out = parameters["lora_A"].shape[-1], parameters["lora_B"].shape[-1]
    expected = {
        name: tuple(parameter.shape)
        for name, parameter in MixLoRAAdapter(d_in, d_out, config, device="meta").named_parameters()
    }
    given = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    if expected != given:
        raise ValueError(f"{layer}: adapter_config.json makes the shapes {expected}, the weights have {given}")
