"""Record a model before an adapter is injected, and restore it if the adapter is refused."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import MixLoRALayer

# transformers' attribute of a model that has adapters.
LOADED = "_hf_peft_config_loaded"


class Before:
    """What the injection of an adapter changes in a model: its modules, the attributes of layers that hold adapters,
    and which parameters require a gradient. It holds references and flags, and no copies of weights.

    Attributes:
        first: whether the model had no adapter of this method.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        modules = list(model.modules())
        self.first = not any(isinstance(module, MixLoRALayer) for module in modules)
        self.children = [(module, dict(module._modules)) for module in modules]
        self.adapted = [(module, _attributes(module)) for module in modules if _is_adapted(module)]
        self.trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.has_configs = "peft_config" in vars(model)
        self.loaded = vars(model).get(LOADED)

    def restore(self) -> None:
        """Restore the model."""
        for module, children in self.children:
            for name, child in [*module._modules.items()]:
                if children.get(name) is not child:
                    del module._modules[name]
            for name, child in children.items():
                module._modules.setdefault(name, child)
            if list(module._modules) != list(children):  # the order of modules is the order of a state dict
                ordered = {name: module._modules.pop(name) for name in children}
                module._modules.update(ordered)
        for module, attributes in self.adapted:
            for name in _own(module) - attributes.keys():
                delattr(module, name)
            for name, (value, entries) in attributes.items():
                if entries is not None:  # refilled, not replaced: other references to it see the entries too
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(entries)
                vars(module)[name] = value
        for parameter, requires_grad in self.trained:
            parameter.requires_grad_(requires_grad)
        if not self.has_configs:
            vars(self.model).pop("peft_config", None)
        if self.loaded is None:
            vars(self.model).pop(LOADED, None)
        else:
            setattr(self.model, LOADED, self.loaded)


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _own(module: nn.Module) -> set[str]:
    return vars(module).keys() - {"_modules", "_parameters", "_buffers"}


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """A module's own attributes by name, each with a copy if it is a container, in which adapters are entered."""
    values = {name: vars(module)[name] for name in _own(module)}
    return {
        name: (value, value.copy() if isinstance(value, (dict, list, set)) else None) for name, value in values.items()
    }
