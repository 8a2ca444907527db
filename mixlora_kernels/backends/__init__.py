"""The backends, and the choice between them.

Each offers ``forward`` and ``backward``, which the differentiable operation calls (arguments and results in
``staged.py``), and ``decode``, for up to ``FEW`` tokens × slots without a backward. ``torch`` and ``triton`` are made
of stages, ``native`` is one piece. The reference is a backend by name only.
"""

import os
import warnings
from functools import cache
from types import ModuleType

from torch import Tensor, compiler, cuda, float32, jit, nn, version

from .. import reference
from . import native, torch

NAMES = ("reference", "torch", "native", "triton")
OLDEST_TRITON = (3, 2)
KERNEL_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")
OLDEST_CAPABILITY = (8, 0)


def check_name(name: str | None) -> str | None:
    """Raise a ValueError unless ``name`` is a backend's or None."""
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))} or None, got {name!r}")
    return name


def select(
    name: str | None, x: Tensor, factors: int = 1, dropout: bool = False, setting: str | None = None
) -> ModuleType:
    """The backend of that name, or for None the best one for x, a pool of so many factors, with dropout or without:
    triton on a GPU, native on a CPU, and torch for whatever they are not for, such as a ``setting`` that it alone has.

    Raises:
        ImportError, TypeError, ValueError: ``"triton"`` or ``"native"`` was asked for and cannot run. Under None torch
            serves instead of triton, and one warning says why.
    """
    device = x.device.type
    if check_name(name) == "torch":
        return torch
    if name == "reference":
        return reference
    if name == "native" or (name is None and device != "cuda"):
        obstacle = find_native_obstacle(x, factors, dropout, setting)
        if obstacle is None:
            return native
        if name is None:
            return torch
        error, message = obstacle
        raise error(f"backend='native' {message}: use backend='torch'")
    obstacle = find_obstacle(device, x.device.index, str(x.dtype))
    if obstacle is None and setting:
        obstacle = ValueError, f"backend='triton' has no {setting}"
    if obstacle is None:
        from . import triton

        return triton
    error, message = obstacle
    if name == "triton":
        raise error(message)
    warn_once(f"{message}; the torch backend serves instead")
    return torch


def find_native_obstacle(
    x: Tensor, factors: int, dropout: bool, setting: str | None
) -> tuple[type[Exception], str] | None:
    """Why the C kernels cannot run on such a tensor, as an error and the rest of its message; None where they can."""
    # A compiler and torch.jit.trace follow tensors; what is done by their addresses they do not see.
    if compiler.is_compiling() or jit.is_tracing() or type(x) not in (Tensor, nn.Parameter):
        return TypeError, f"needs a tensor with an address, and no tracing, got {type(x).__name__}"
    if x.dtype is not float32:
        return TypeError, f"needs x in torch.float32, got {x.dtype}"
    if x.device.type != "cpu":
        return ValueError, f"needs x on the CPU, got {x.device}"
    if dropout:
        return ValueError, "has no dropout"
    if factors > native.WIDEST:
        return ValueError, f"takes pools of up to {native.WIDEST} factors, got {factors}"
    if setting:
        return ValueError, f"has no {setting}"
    if not x.numel():
        return ValueError, f"needs tokens, got x of shape {tuple(x.shape)}"
    return find_library_obstacle()


@cache
def find_library_obstacle() -> tuple[type[Exception], str] | None:
    try:
        native.load()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):  # they are there, and something is wrong with them
            warn_once(f"the native backend needs its C kernels, {error}; the torch backend serves instead")
        return ImportError, f"needs its C kernels, {error}"
    return None


def find_obstacle(device_type: str, device_index: int | None, dtype: str) -> tuple[type[Exception], str] | None:
    """Why the Triton kernels cannot run on such a tensor, as an error and its message; None where they can."""
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "yes", "on", "y"):
        return ValueError, (
            "backend='triton' needs a GPU, got a tensor on the CPU: move it there, use backend='torch', or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    if device_type not in ("cpu", "cuda"):
        return ValueError, f"backend='triton' needs a CUDA or ROCm device, got {device_type}: use backend='torch'"
    if dtype not in KERNEL_DTYPES:
        return TypeError, f"backend='triton' needs x in {', '.join(KERNEL_DTYPES)}, got {dtype}: use backend='torch'"
    needed = ".".join(map(str, OLDEST_TRITON))
    try:
        import triton
    except ImportError:
        return ImportError, f"backend='triton' needs Triton {needed} or newer, found none: install triton"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return ImportError, f"backend='triton' needs Triton {needed} or newer, found {triton.__version__}: upgrade it"
    if device_type == "cuda":
        capability = cuda.get_device_capability(device_index)
        if version.hip is None and capability < OLDEST_CAPABILITY:
            needed, found = (".".join(map(str, c)) for c in (OLDEST_CAPABILITY, capability))
            return ValueError, f"backend='triton' needs compute capability {needed}, got {found}: use backend='torch'"
    elif isinstance(triton.language.sum, triton.runtime.JITFunction):
        return ValueError, (
            "backend='triton' on the CPU needs TRITON_INTERPRET=1 from the start, and Triton was imported without it: "
            "set it before Python starts"
        )
    return None


@cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
