"""Select a backend."""

import os
import warnings
from functools import cache

import torch
from torch import Tensor

from .base import Backend
from .eager import EAGER
from .reference import REFERENCE

NAMES = ("reference", "torch", "triton")
OLDEST_TRITON = (3, 7)
KERNEL_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")
OLDEST_CAPABILITY = (8, 0)


def check_name(name: str | None) -> str | None:
    """Raise a ValueError unless ``name`` is None or the name of a backend; return it."""
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))} or None, got {name!r}")
    return name


def select(name: str | None, x: Tensor) -> Backend:
    """Return the backend of that name. None selects triton on a GPU, and torch elsewhere.

    Raises:
        ImportError, TypeError, ValueError: ``"triton"`` was asked for and cannot run. Under None the torch backend is
            used instead, and a warning says once why.
    """
    device = x.device
    if name == "reference":
        return REFERENCE
    if name == "torch" or (name is None and device.type != "cuda"):
        return EAGER
    check_name(name)
    obstacle = find_obstacle(device.type, device.index, str(x.dtype))
    if obstacle is None:
        return _kernels()
    error, message = obstacle
    if name == "triton":
        raise error(message)
    warn_once(f"{message}; the torch backend is used instead")
    return EAGER


@cache
def _kernels() -> Backend:
    from .kernels import KERNELS  # here, because it imports Triton

    return KERNELS


def find_obstacle(device_type: str, device_index: int | None, dtype: str) -> tuple[type[Exception], str] | None:
    """Return why the Triton kernels cannot run on such a tensor, as an error and its message; None if they can."""
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0").lower() not in ("1", "true", "yes", "on", "y"):
        return ValueError, (
            "backend='triton' needs a GPU, got a tensor on the CPU: move it there, use backend='torch', or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter"
        )
    if device_type not in ("cpu", "cuda"):
        return ValueError, f"backend='triton' needs a CUDA or ROCm device, got {device_type}: use backend='torch'"
    if dtype not in KERNEL_DTYPES:
        return TypeError, f"backend='triton' needs x in {', '.join(KERNEL_DTYPES)}, got {dtype}: use backend='torch'"
    return _find_library_obstacle(device_type, device_index)


@cache
def _find_library_obstacle(device_type: str, device_index: int | None) -> tuple[type[Exception], str] | None:
    needed = ".".join(map(str, OLDEST_TRITON))
    try:
        import triton
    except ImportError:
        return ImportError, f"backend='triton' needs Triton {needed} or newer, found none: install triton"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return ImportError, f"backend='triton' needs Triton {needed} or newer, found {triton.__version__}: upgrade it"
    if device_type == "cuda":
        capability = torch.cuda.get_device_capability(device_index)
        if torch.version.hip is None and capability < OLDEST_CAPABILITY:
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
