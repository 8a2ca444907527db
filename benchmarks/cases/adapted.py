"""A whole model under each implementation: every projection of its text decoder adapted."""

import re
from collections.abc import Iterator
from dataclasses import asdict

import torch
from peft import get_peft_model
from torch import Tensor, nn

import mixlora_kernels as mk

from .implementations import IMPLEMENTATIONS, mixlora, with_lora
from .problem import draw_factors

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapt_model(name: str, model: nn.Module, config: mk.MixLoRAConfig, seed: int, exact: bool = False) -> nn.Module:
    """The model, which is frozen and changed in place, with adapters of which none is zero.

    LoRA and the forms of ``mixlora`` come as their users have them, through ``get_peft_model``; of the others each
    projection is replaced. ``base`` has no adapters.

    Args:
        exact: the same function through the package's reference, to compare with; LoRA has no other.
    """
    chosen = IMPLEMENTATIONS[name]
    model.requires_grad_(False)
    if chosen.kind == "frozen":
        return model
    if chosen.kind == "lora":
        torch.manual_seed(seed)
        targets = {"target_modules": projection_names(model), "init_lora_weights": False}
        return with_lora(model, config, chosen.exact, **targets)
    config = chosen.configure(config)
    if chosen.adapt is mixlora and not exact:
        from mixlora_kernels.peft import ConditionalMixLoRAConfig  # only here: the layers do without peft's inside
        from mixlora_kernels.peft.side_information import find_side_information

        targets = {"target_modules": projection_names(model)}
        model = get_peft_model(model, ConditionalMixLoRAConfig(**asdict(config), **targets))
        find_side_information(model).groups_siblings = chosen.shares
        for number, (parent, leaf) in enumerate(projections(model)):
            layer = getattr(parent, leaf)
            layer.mixlora_adapter["default"].load_state_dict(factors_of(layer.base_layer, number, config, seed))
        return model
    for number, (parent, leaf) in enumerate(projections(model)):
        linear = getattr(parent, leaf)
        layer = (mixlora if exact else chosen.adapt)(linear, config, factors_of(linear, number, config, seed))
        if exact:
            layer.backend = "reference"
        setattr(parent, leaf, Remembering(layer) if chosen.keeps else layer)
    return model


def use_backend(model: nn.Module, name: str) -> None:
    """Of all the adapters in the model."""
    for module in model.modules():
        if isinstance(module, mk.MixLoRAAdapter):
            module.backend = name


def factors_of(linear: nn.Linear, number: int, config: mk.MixLoRAConfig, seed: int) -> dict[str, Tensor]:
    """The adapter's parameters in the model's so-manieth projection, whatever was drawn before."""
    torch.manual_seed(seed + number)
    return draw_factors(linear.in_features, linear.out_features, config, linear.weight.device)


def projections(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the decoder's linear layers are: the module that holds each, and its name there."""
    parents = [parent for block in model.get_decoder().layers for parent in (block.self_attn, block.mlp)]
    return [(parent, leaf) for parent in parents for leaf in PROJECTIONS if hasattr(parent, leaf)]


def projection_names(model: nn.Module) -> str:
    """An expression for the decoder's linear layers; a vision tower uses the same names for its own."""
    decoder = model.get_decoder()
    path = next(f"{name}." if name else "" for name, module in model.named_modules() if module is decoder)
    return rf"{re.escape(path)}layers\.\d+\.\w+\.({'|'.join(PROJECTIONS)})"


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained, by a name that does not depend on how the implementation nests it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.")
            yield re.sub(r"\.(layer|adapter|mixlora_adapter\.default)(?=\.)", "", name), parameter


class Remembering(nn.Module):
    """An adapted layer that keeps the routing of a prompt for the tokens generated from it (decode="prompt").

    A prompt is told from a step by its length, which holds for a plain greedy generation.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.routing = layer, None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.layer(x)
        if x.shape[1] > 1:
            y, self.routing = self.layer(x, return_routing=True)
            return y
        return self.layer(x, mk.RoutingContext(routing=self.routing))
