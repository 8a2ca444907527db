"""Checks of the operation's input, before anything is computed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends.base import Factors, FrozenLinear
from .backends.node import autocasts
from .config import MixLoRAConfig
from .routing import Routing, RoutingContext


def check_context(context: RoutingContext | None) -> RoutingContext:
    """Return the context, or an empty one for None. Raise a TypeError if it is something else."""
    if context is None:
        return RoutingContext()
    if not isinstance(context, RoutingContext):
        raise TypeError(f"context must be a RoutingContext or None, got {type(context).__name__}")
    return context


def factor_shapes(config: MixLoRAConfig, d_in: int, d_out: int) -> dict[str, tuple[int, ...] | None]:
    """The shape of each field of ``Factors`` by name, or None for a parameter that the configuration does not use."""
    E = config.num_factors
    d_route = d_in if config.task_dim is None else config.task_dim
    return {
        "lora_A": (E, d_in),
        "lora_B": (E, d_out),
        "router_A": (E, d_route) if config.has_routers else None,
        "router_B": (E, d_route) if config.has_routers and config.chooses_b else None,
        "router_AB": (config.r, E, d_in) if config.has_conditioning else None,
    }


def check_input(
    x: Tensor, bases: Sequence[Tensor | FrozenLinear], factors: Sequence[Factors], config: MixLoRAConfig, routes: bool
) -> None:
    """Raise a TypeError or a ValueError unless x fits every base and every adapter of a group. ``routes``: whether
    factors are chosen, which reads the routers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not factors or len(bases) != len(factors):
        raise ValueError(f"as many adapters as bases are needed, got {len(factors)} and {len(bases)}")
    d_in = factors[0].lora_A.shape[-1]
    if not x.is_floating_point():
        raise TypeError(f"x must have a floating dtype, got {x.dtype}")
    if x.dim() < 2 or x.shape[-1] != d_in:
        raise ValueError(f"x must have the shape [B, L, {d_in}] or [L, {d_in}], got {tuple(x.shape)}")
    shapes, device, last = {}, x.device, None
    for base, own in zip(bases, factors):
        d_out = own.lora_B.shape[-1]
        if d_out != last:
            shapes, last = factor_shapes(config, d_in, d_out), d_out
        for (name, shape), tensor in zip(shapes.items(), own if routes else (own.lora_A, own.lora_B)):
            if shape is None:
                continue
            if tensor is None or tensor.shape != shape or tensor.device != device or not tensor.is_floating_point():
                raise _factor_error(name, tensor, shape, device)
        _check_base(x, base, d_in, d_out)


def _factor_error(name: str, tensor: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Exception:
    if tensor is None:
        return ValueError(f"the configuration needs {name}, got None")
    if tensor.shape != shape:
        return ValueError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        return TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
    return ValueError(f"x must be on the adapter's device, {tensor.device}, got {device}")


def _check_base(x: Tensor, base: Tensor | FrozenLinear, d_in: int, d_out: int) -> None:
    if isinstance(base, FrozenLinear):
        if base.weight.shape != (d_out, d_in):
            raise ValueError(f"the base's weight must have the shape {(d_out, d_in)}, got {tuple(base.weight.shape)}")
        if base.weight.dtype != x.dtype and not autocasts(x.device.type):
            raise TypeError(f"x must have the base's dtype, {base.weight.dtype}, got {x.dtype}")
        if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            raise ValueError("the base's weight and bias must be frozen: call requires_grad_(False) on both")
    elif base.shape != (*x.shape[:-1], d_out):
        raise ValueError(f"the base must map x to the shape {(*x.shape[:-1], d_out)}, got {tuple(base.shape)}")
    elif not base.is_floating_point():
        raise TypeError(f"the base's output must have a floating dtype, got {base.dtype}")


def check_routing(routing: Routing, config: MixLoRAConfig, siblings: int, count: int) -> None:
    """Raise a TypeError or a ValueError unless a given routing has the shapes and dtypes of G siblings and B
    instances."""
    r, E = config.r, config.num_factors
    for name, tensor, last in zip(Routing._fields, routing, (r, r, r, E, E)):
        if tensor.shape != (siblings, count, last):
            letters = "G, B, E" if name.startswith("probs") else "G, B, r"
            first = 1 if siblings == 1 else 0  # who calls ``mixlora`` knows no G
            expected, got = (siblings, count, last)[first:], tuple(tensor.shape[first:])
            raise ValueError(f"routing.{name} must have the shape [{letters[3 * first :]}] = {expected}, got {got}")
    for name, index in (("index_a", routing.index_a), ("index_b", routing.index_b)):
        if index.dtype != torch.int64:
            raise TypeError(f"routing.{name} must be int64, got {index.dtype}")
