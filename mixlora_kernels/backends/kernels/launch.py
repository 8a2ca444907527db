"""Launches, and the registration of the ops that make them.

A step has dozens of launches, and with few tokens a GPU waits for each. So what follows from sizes is worked out once
for them (``plan``), and what Triton would find out anew at every launch is kept (``Launch``).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor

# Keeps what a function of sizes returned. Ragged batches bring new sizes all the time, so not without end.
plan = lru_cache(maxsize=4096)

library = torch.library.Library("mixlora_kernels", "FRAGMENT")
implementations: dict[str, Callable] = {}  # of the ops, by name; benchmarks/compile_report.py calls them directly


class Launch:
    """One kernel at certain sizes.

    The first launch goes through Triton, which finds or compiles what fits the arguments. Beside the sizes that is a
    matter of the tensors' dtypes, and of whether every address is a multiple of 16 bytes: later launches with the same
    answers run what the first one ran, by ``CompiledKernel[grid](*arguments)``.

    Args:
        kernel: a function in Triton's language.
        grid: how many programs; where there are none, nothing is launched.
        options: what is said to the compiler.
        sizes: the kernel's arguments that are no tensors, by name.
    """

    def __init__(self, kernel, grid: tuple[int, ...], options: dict[str, int], **sizes):
        self.kernel, self.grid, self.options = kernel, (*grid, 1, 1)[:3], options
        self.arguments = {name: sizes.pop(name, None) for name in kernel.arg_names}
        if sizes:
            raise TypeError(f"{kernel.__name__} has no argument {', '.join(sizes)}")
        self.kept: dict[tuple, Callable] = {}

    def __call__(self, device: torch.device, **tensors: Tensor | tuple[Tensor, ...] | None) -> None:
        """Launch with these tensors on their device, which need not be the current one."""
        if 0 in self.grid:
            return
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(device, **tensors)
        kinds, addresses = [device.index], 0
        for value in tensors.values():
            if value is None:
                kinds.append(None)
            elif type(value) is tuple:
                for tensor in value:
                    kinds.append(tensor.dtype)
                    addresses |= tensor.data_ptr()
            else:
                kinds.append(value.dtype)
                addresses |= value.data_ptr()
        arguments, key, aligned = {**self.arguments, **tensors}, tuple(kinds), addresses % 16 == 0
        run = self.kept.get(key) if aligned else None
        if run is not None:
            return run(*arguments.values())
        compiled = self.kernel[self.grid](**arguments, **self.options)
        if aligned and isinstance(compiled, triton.compiler.CompiledKernel):  # an interpreter compiles none
            self.kept[key] = compiled[self.grid]


def as_rows(x: Tensor) -> Tensor:
    """x itself where the elements of a row are neighbours, whatever the distance of the rows; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_pools(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The siblings' pools for a kernel, which takes a tuple of pointers of one type."""
    for tensor in tensors:
        if tensor.dtype is not tensors[0].dtype or not tensor.is_contiguous():
            dtype = tensor.dtype if len({tensor.dtype for tensor in tensors}) == 1 else torch.float32
            return tuple(tensor.to(dtype).contiguous() for tensor in tensors)
    return tuple(tensors)


def register(name: str, fill: Callable, allocate: Callable, mutates: Sequence[str] = ()) -> Callable:
    """Register ``mixlora_kernels::<name>``, opaque to torch.compile, and return what calls it.

    ``allocate`` takes the op's arguments and returns its outputs with nothing in them, which is all that a graph being
    traced needs; ``fill`` takes the outputs and the arguments, and launches. The op's signature is read off the
    annotations of ``allocate``. Only a graph being traced goes through the dispatcher, which costs as much as several
    launches.
    """

    def op(*arguments):
        outputs = allocate(*arguments)
        fill(outputs, *arguments)
        return outputs

    schema = torch.library.infer_schema(allocate, mutates_args=mutates)
    library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        library.impl(name, op, key)
    torch.library.register_fake(f"mixlora_kernels::{name}", allocate, lib=library)
    registered = getattr(torch.ops.mixlora_kernels, name).default

    def call(*arguments):
        if torch.compiler.is_compiling() or is_traced(arguments):
            return registered(*arguments)
        outputs = allocate(*arguments)
        fill(outputs, *arguments)
        return outputs

    op.module = fill.__module__
    implementations[name] = op
    return call


def is_traced(arguments: tuple) -> bool:
    """Whether the first tensor is one of a graph being traced, or of another subclass that has to see the op."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            return type(argument) not in (Tensor, torch.nn.Parameter) or argument.device.type == "meta"
    return False
