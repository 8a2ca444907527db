"""Recognise linear layers, and the experts and routers of mixtures of experts, which are not adapted."""

import copy

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Libraries whose subclasses of nn.Linear are linear layers with quantised weights. They are not tried out: their
# kernels need certain devices, and some change the weight in their first run.
QUANTISING = ("bitsandbytes", "torchao", "gptqmodel", "hqq", "aqlm", "eetq", "optimum", "transformers.integrations")
# Modules of torch that compute with the weights of their linear layers without calling these: attention always, the
# encoder's layer in its fast path for inference.
WEIGHT_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_linear(module: nn.Module) -> bool:
    """Whether a module maps [..., d_in] to [..., d_out]: ``nn.Linear``, its quantised kin, GPT-2's ``Conv1D``.

    A subclass of ``nn.Linear`` with a forward of its own is tried out. It may be the router of a mixture of experts,
    which returns several tensors, or a grouped layer, which takes other shapes.
    """
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, nn.Linear):
        library = f"{type(module).__module__}."
        return (
            type(module).forward is nn.Linear.forward
            or library.startswith(tuple(f"{name}." for name in QUANTISING))
            or _maps_as_linear(module)
        )
    if isinstance(module, Conv1D):
        return True
    sizes = (("in_features", "out_features"), ("infeatures", "outfeatures"))
    has_sizes = any(all(isinstance(getattr(module, name, None), int) for name in pair) for pair in sizes)
    return has_sizes and "Linear" in type(module).__name__


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """d_in and d_out of a linear layer, with or without adapters."""
    return _get_in_out_features(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)


def _maps_as_linear(module: nn.Linear) -> bool:
    """Whether the forward maps [..., d_in] to [..., d_out]. It runs on the meta device, which computes shapes alone."""
    stand_in = copy.copy(module)
    stand_in._parameters = {
        name: None if value is None else nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
        for name, value in module._parameters.items()
    }
    x = torch.empty(2, 3, module.in_features, device="meta", dtype=stand_in.weight.dtype)
    try:
        y = type(module).forward(stand_in, x)
    except Exception:  # any error shows that it needs other input than a linear layer
        return False
    return isinstance(y, Tensor) and y.shape == (2, 3, module.out_features)


def expert_modules(model: nn.Module) -> dict[str, str]:
    """The experts of mixtures of experts, which cannot be adapted, by name, each with a description.

    An expert gets the tokens that its router sends, and no whole sequence, so that an instance's routing cannot be
    computed there. If experts are parameters of three dimensions, there is no linear layer to replace.
    """
    found: dict[str, str] = {}
    for name, module in outside_adapters(model):
        if name.startswith(tuple(f"{outer}." for outer in found) or "\0"):
            continue
        stacks = _stacks(module)
        if stacks:
            shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in stacks.items())
            found[name] = f"{type(module).__name__} with {shapes}"
        elif name.rpartition(".")[2] == "experts" and isinstance(module, nn.ModuleList):
            found[name] = f"{len(module)} separate experts"
    return found


def expert_routers(model: nn.Module, experts: dict[str, str]) -> set[str]:
    """The linear layers that send tokens to experts: those beside experts that have one output for each expert."""
    routers = set()
    for place in experts:
        module = model.get_submodule(place)
        count = len(module) if isinstance(module, nn.ModuleList) else next(iter(_stacks(module).values())).shape[0]
        block = place.rpartition(".")[0]
        for name, beside in model.get_submodule(block).named_modules(prefix=block):
            if not f"{name}.".startswith(f"{place}.") and is_linear(beside) and linear_sizes(beside)[1] == count:
                routers.add(name)
    return routers


def _stacks(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters that are stacks of matrices, [experts, ..., ...]."""
    if isinstance(module, CONVOLUTIONS):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: value for name, value in own if value.dim() >= 3 and min(value.shape) > 1}


def read_weights(model: nn.Module) -> dict[str, str]:
    """The linear layers whose weights the module around them reads without calling them, by name, each with that
    module's class. An adapter in them has no effect."""
    return {
        f"{name}.{child}" if name else child: type(module).__name__
        for name, module in outside_adapters(model)
        if isinstance(module, WEIGHT_READERS)
        for child, inner in module.named_children()
        if is_linear(inner)
    }


def adaptable_linears(model: nn.Module) -> set[str]:
    """The names of all linear layers that can be adapted: not routers, not inside experts, and called by the model."""
    experts = expert_modules(model)
    apart = expert_routers(model, experts) | read_weights(model).keys()
    inside = tuple(f"{place}." for place in experts) or "\0"
    return {
        name
        for name, module in outside_adapters(model)
        if name and is_linear(module) and name not in apart and not name.startswith(inside)
    }


def outside_adapters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules by name, except those inside adapted layers."""
    inside: tuple[str, ...] = ()
    found = []
    for name, module in model.named_modules():
        if not name.startswith(inside or ("\0",)):
            found.append((name, module))
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, name + ".")
    return found
