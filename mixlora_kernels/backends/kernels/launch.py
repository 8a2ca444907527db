"""What every launch needs: the tensors' device, their rows, the op's registration."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

library = torch.library.Library("mixlora_kernels", "FRAGMENT")
implementations: dict[str, Callable] = {}  # of the ops, by name; benchmarks/compile_report.py calls them directly


def launch(kernel, grid: tuple[int, ...], device: torch.device, **arguments) -> None:
    """Launch on the tensors' device, which need not be the current one; nothing where there is nothing to do."""
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments)


def as_rows(x: Tensor) -> Tensor:
    """x itself where the elements of a row are neighbours, whatever the distance of the rows; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_pools(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The siblings' pools for a kernel, which takes a tuple of pointers of one type."""
    if not tensors:
        return ()
    dtype = tensors[0].dtype
    if any(tensor.dtype != dtype for tensor in tensors):
        tensors = [tensor.float() for tensor in tensors]
    return tuple(tensor.contiguous() for tensor in tensors)


def register(name: str, fill: Callable, allocate: Callable, mutates: Sequence[str] = ()) -> Callable:
    """Register ``mixlora_kernels::<name>``, opaque to torch.compile. Its signature is read off its annotations.

    ``allocate`` takes the op's arguments and returns its outputs with nothing in them, which is all that a graph being
    traced needs; ``fill`` takes the outputs and the arguments, and launches. By hand, because the decorators of
    ``torch.library`` cost microseconds a call more, and there are hundreds of calls in a step.
    """

    def op(*arguments):
        outputs = allocate(*arguments)
        fill(outputs, *arguments)
        return outputs

    op.module = fill.__module__
    implementations[name] = op
    schema = torch.library.infer_schema(allocate, mutates_args=mutates)
    library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        library.impl(name, op, key)
    torch.library.register_fake(f"mixlora_kernels::{name}", allocate, lib=library)
    return getattr(torch.ops.mixlora_kernels, name).default
