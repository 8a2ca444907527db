"""Checks of the operation's input, before anything is computed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends.base import Factors, FrozenLinear
from .backends.node import autocasts
from .config import MixLoRAConfig
from .routing import Routing


def check_input(
    x: Tensor, bases: Sequence[Tensor | FrozenLinear], factors: Sequence[Factors], config: MixLoRAConfig
) -> None:
    """Raise a TypeError or a ValueError unless x fits every base and every adapter of a group."""
    if not factors or len(bases) != len(factors):
        raise ValueError(f"as many adapters as bases are needed, got {len(factors)} and {len(bases)}")
    E, d_in = config.num_factors, factors[0].lora_A.shape[1]
    if not x.is_floating_point():
        raise TypeError(f"x must have a floating dtype, got {x.dtype}")
    if x.dim() < 2 or x.shape[-1] != d_in:
        raise ValueError(f"x must have the shape [B, L, {d_in}] or [L, {d_in}], got {tuple(x.shape)}")
    for base, own in zip(bases, factors):
        if own.lora_A.shape != (E, d_in):
            raise ValueError(f"lora_A must have the shape {(E, d_in)}, got {tuple(own.lora_A.shape)}")
        if x.device != own.lora_A.device:
            raise ValueError(f"x must be on the adapter's device, {own.lora_A.device}, got {x.device}")
        _check_base(x, base, d_in, own.lora_B.shape[1])


def _check_base(x: Tensor, base: Tensor | FrozenLinear, d_in: int, d_out: int) -> None:
    if isinstance(base, FrozenLinear):
        if base.weight.shape != (d_out, d_in):
            raise ValueError(f"the base's weight must have the shape {(d_out, d_in)}, got {tuple(base.weight.shape)}")
        if base.weight.dtype != x.dtype and not autocasts(x.device.type):
            raise TypeError(f"x must have the base's dtype, {base.weight.dtype}, got {x.dtype}")
    elif base.shape != (*x.shape[:-1], d_out):
        raise ValueError(f"the base must map x to the shape {(*x.shape[:-1], d_out)}, got {tuple(base.shape)}")


def check_routing(routing: Routing, config: MixLoRAConfig, siblings: int, count: int) -> None:
    """Raise a TypeError or a ValueError unless a given routing has the shapes and dtypes of G siblings and B
    instances."""
    before, sizes = ("", ()) if siblings == 1 else ("G, ", (siblings,))
    slots = f"[{before}B, r]", (*sizes, count, config.r)
    factors = f"[{before}B, E]", (*sizes, count, config.num_factors)
    expected = {"index_a": slots, "index_b": slots, "gate": slots, "probs_a": factors, "probs_b": factors}
    for name, (letters, shape) in expected.items():
        tensor = getattr(routing, name)
        got = tensor.shape[1:] if siblings == 1 else tensor.shape
        if got != shape:
            raise ValueError(f"routing.{name} must have the shape {letters} = {shape}, got {tuple(got)}")
        if name.startswith("index") and tensor.dtype != torch.int64:
            raise TypeError(f"routing.{name} must be int64, got {tensor.dtype}")
