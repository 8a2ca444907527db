"""The tensors that an adapter consists of, before it is made and after."""

from collections.abc import Callable

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..adapter import MixLoRAAdapter
from .config import ConditionalMixLoRAConfig
from .files import Expected
from .linears import linear_sizes, outside_adapters

LOAD_MAP = "adapter_state_dict_load_map"  # of peft's wrappers of modules that are trained in full
ATTRIBUTE = "mixlora_adapter"  # of MixLoRALayer, where its adapters are


def tensors_to_come(model: nn.Module, config: ConditionalMixLoRAConfig, matches: Callable) -> dict[str, Expected]:
    """What an adapter with this configuration would consist of in this model. Nothing is made.

    Args:
        matches: peft's answer to whether a configuration targets a module, by configuration and name.

    Returns:
        By the names in the model, without the adapter's name.
    """
    expected: dict[str, Expected] = {}
    for name, module in outside_adapters(model):
        if name and matches(config, name):
            shapes = MixLoRAAdapter.shapes(*linear_sizes(module), config)
            expected |= {
                f"{name}.{ATTRIBUTE}.{parameter}": Expected(shape)
                for parameter, shape in shapes.items()
                if shape is not None
            }
    endings = tuple(config.modules_to_save or ())
    for name, module in model.named_modules(remove_duplicate=False) if endings else ():
        if name.endswith(endings):
            kept = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
            expected |= {
                f"{name}.{key}": Expected(tuple(getattr(value, "ds_shape", value.shape)), value.dtype, own=False)
                for key, value in kept.state_dict(keep_vars=True).items()
            }
    return expected


def tensors_in_place(model: nn.Module, adapter_name: str) -> dict[str, Expected]:
    """What an adapter consists of that a model has, by the full names of its state dict."""
    state, expected = model.state_dict(), {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for key in getattr(module, LOAD_MAP)(adapter_name).values():
                value = state[f"{name}.{key}"]
                expected[f"{name}.{key}"] = Expected(tuple(value.shape), value.dtype, own=False)
    marker = f".{ATTRIBUTE}.{adapter_name}."
    expected |= {key: Expected(tuple(value.shape), value.dtype) for key, value in state.items() if marker in key}
    return expected
