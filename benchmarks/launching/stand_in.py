"""Triton on a machine without a GPU: its driver is replaced by one that compiles for a GPU and launches nothing.

Everything up to the launch then runs as it does on a GPU: the package's Python, Triton's specialisation and its look-up
of the compiled kernel. ``install`` lasts for the process.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as drivers

from mixlora_kernels import routing
from mixlora_kernels.backends import select

from .accesses import find_accesses

CAPABILITY = (9, 0)  # an H100's and an H200's
SHARED = 232_448  # bytes of shared memory that one program may have there
THREADS = 1024


class Kernel(NamedTuple):
    """A launch that did not happen: the kernel, its arguments by name, and which of them it reads and writes."""

    name: str
    arguments: dict[str, object]
    accesses: dict[str, str]  # "r", "w" or "rw"


class Utilities:
    """What Triton asks about a device and loads onto it."""

    shared = SHARED

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Module and function, registers, spilled registers, threads."""
        return object(), object(), 0, 0, THREADS  # a module of None would be loaded again at every launch


class Driver:
    """What Triton's runtime calls of a driver.

    Attributes:
        target, device: what Triton compiles for, and the number that it keeps the kernels under.
        record: is told of every launch; None, as while times are taken: nobody is.
    """

    target, device = GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32), 0

    def __init__(self):
        self.utils = Utilities()
        self.record: Callable[[Kernel], None] | None = None
        self.texts: dict[str, str] = {}  # of the compiled kernels in Triton's own language, by hash
        triton.knobs.runtime.kernel_load_start_hook.add(
            lambda _module, _function, name, files, key: self.read(name, files, key)
        )

    def launcher_cls(self, source, metadata) -> Callable:
        """What launches one compiled kernel."""
        names = source.fn.arg_names
        accesses = cache(lambda: find_accesses(self.texts[metadata.hash], list(_passed(source))))

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            if self.record is not None:
                self.record(Kernel(metadata.name, dict(_flat(names, arguments)), accesses()))

        return launch

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda

    def read(self, name: str, files: dict[str, str], key: str) -> None:
        """Read what Triton compiled, when it is loaded."""
        self.texts[key] = Path(files[f"{name}.ttir"]).read_text(encoding="utf-8")


def _passed(source) -> Iterator[str]:
    """The names of the arguments that the compiled kernel has; the others are constants in it."""
    types = [source.signature[name] for name in source.fn.arg_names]
    return (name for name, kind in _flat(source.fn.arg_names, types) if kind != "constexpr")


def _flat(names: Sequence[str], values: Sequence) -> Iterator[tuple[str, object]]:
    """Names and values, the members of a tuple one by one."""
    for name, value in zip(names, values):
        if isinstance(value, tuple):
            yield from _flat([f"{name}[{n}]" for n in range(len(value))], value)
        else:
            yield name, value


@cache
def install() -> Driver:
    """Make the kernels run, up to their launches, on tensors of the CPU and of the meta device.

    The package takes them for tensors of an H100: it chooses the tiles for one, and looks at no value, which would
    stall a GPU.

    Raises:
        RuntimeError: Triton was imported as an interpreter.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET must not be set: what is examined is the way to a launch")
    driver = Driver()
    drivers.set_active(driver)
    from mixlora_kernels.backends.kernels import tuning  # with Triton's driver in place

    find_obstacle = select.find_obstacle
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    _replace(select, "find_obstacle", lambda kind, index, dtype: find_obstacle("cuda", 0, dtype))
    _replace(routing, "can_look", lambda tensor: False)
    _replace(tuning, "architecture", cache(lambda device: "sm_{}{}".format(*CAPABILITY)))
    return driver


def _replace(module, name: str, value) -> None:
    """In the module and wherever the package has imported it from there; an AttributeError where it is no more."""
    old = getattr(module, name)
    for other in [found for key, found in sys.modules.items() if key.startswith("mixlora_kernels")]:
        for key in [key for key, found in vars(other).items() if found is old]:
            setattr(other, key, value)
