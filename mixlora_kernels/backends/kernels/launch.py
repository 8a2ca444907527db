"""What every launch needs: the tensor's device, its rows, the op's registration."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

library = torch.library.Library("mixlora_kernels", "FRAGMENT")


def launch(kernel, grid: tuple[int, ...], device: torch.device, *args, **meta) -> None:
    """Launch on the tensors' device, which need not be the current one; nothing where there is nothing to do."""
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **meta)


def as_rows(x: Tensor) -> Tensor:
    """x itself where the elements of a row are neighbours, whatever the distance of the rows; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def register(signature: str, function: Callable, fake: Callable) -> Callable:
    """Register ``mixlora_kernels::<signature>``, opaque to torch.compile; ``fake`` gives the outputs' shapes.

    By hand, because the decorators of ``torch.library`` cost microseconds a call more, and there are hundreds of
    calls in a step.
    """
    name = library.define(signature, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        library.impl(name, function, key)
    torch.library.register_fake(f"mixlora_kernels::{name}", fake, lib=library)
    return getattr(torch.ops.mixlora_kernels, name).default
