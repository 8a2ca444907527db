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
    """The siblings' pools for a kernel, which takes a tuple of pointers of one type: at most float32, in which the
    kernels compute."""
    for tensor in tensors:
        dtype = tensor.dtype
        if dtype is not tensors[0].dtype or dtype is torch.float64 or not tensor.is_contiguous():
            if dtype is torch.float64 or any(other.dtype is not dtype for other in tensors):
                dtype = torch.float32
            return tuple(own.to(dtype).contiguous() for own in tensors)
    return tuple(tensors)


class Op:
    """An op ``torch.ops.mixlora_kernels.<name>``, opaque to torch.compile.

    Args:
        run: allocates the op's outputs, fills them with launches, and returns them.
        allocate: takes ``run``'s arguments and returns its outputs with nothing in them, which is all that a graph
            being traced needs. The op's signature is read off its annotations.
        mutates: the names of the arguments that ``run`` changes.
    """

    def __init__(self, name: str, run: Callable, allocate: Callable, mutates: Sequence[str] = ()):
        self.run = run
        schema = torch.library.infer_schema(allocate, mutates_args=mutates)
        library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        for key in ("CPU", "CUDA"):
            library.impl(name, run, key)
        torch.library.register_fake(f"mixlora_kernels::{name}", allocate, lib=library)
        self.registered = getattr(torch.ops.mixlora_kernels, name).default

    def on(self, x: Tensor) -> Callable:
        """What to call for tensors like x. Only a graph being traced, or a subclass of tensors that has to see the op,
        goes through the dispatcher, which costs as much as several launches."""
        plain = type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta"
        return self.run if plain and not torch.compiler.is_compiling() else self.registered
