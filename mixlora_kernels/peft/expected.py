"""The tensors of an adapter, before and after it is injected into a model."""

from collections.abc import Callable

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..adapter import MixLoRAAdapter
from .config import ConditionalMixLoRAConfig
from .files import Expected
from .linears import linear_sizes, outside_adapters

LOAD_MAP = "adapter_state_dict_load_map"  # a method of peft's wrappers of modules_to_save
ATTRIBUTE = "mixlora_adapter"  # MixLoRALayer's attribute that holds its adapters


def tensors_to_come(model: nn.Module, config: ConditionalMixLoRAConfig, matches: Callable) -> dict[str, Expected]:
    """The tensors that an adapter with this configuration would have in this model. The model is not changed.

    Args:
        matches: peft's function of a configuration and a module's name that tells whether the module is a target.

    Returns:
        The expected tensors by their names in the model, without the adapter's name.
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
    """The tensors of an adapter that has been injected into a model, by their names in the state dict."""
    state, expected = model.state_dict(), {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for key in getattr(module, LOAD_MAP)(adapter_name).values():
                value = state[f"{name}.{key}"]
                expected[f"{name}.{key}"] = Expected(tuple(value.shape), value.dtype, own=False)
    marker = f".{ATTRIBUTE}.{adapter_name}."
    expected |= {key: Expected(tuple(value.shape), value.dtype) for key, value in state.items() if marker in key}
    return expected
