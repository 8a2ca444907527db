"""The backends, and the choice between them.

``torch`` and ``triton`` offer the same stages, each with its backward: ``project`` (x to the pool's products and
the routers' logits), ``route`` (logits to the choice of factors, with ``condition_table``) and ``expand`` (the
chosen products into y); and ``decode`` (all of it for up to ``FEW`` tokens × slots, without a backward). What one
stage hands to the next is the backend's own affair. The reference is a backend by name only: it has no stages.
"""

import os
import warnings
from functools import cache
from types import ModuleType

from torch import Tensor, cuda, version

NAMES = ("reference", "torch", "triton")
OLDEST_TRITON = (3, 2)
KERNEL_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")
OLDEST_CAPABILITY = (8, 0)


def check_name(name: str | None) -> str | None:
    """Raise a ValueError unless ``name`` is a backend's or None."""
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))} or None, got {name!r}")
    return name


def select(name: str | None, x: Tensor) -> ModuleType:
    """The backend of that name, or for None the best one for x: triton on a GPU, else torch.

    Raises:
        ImportError, TypeError, ValueError: ``"triton"`` was asked for and cannot run. Under None torch serves
            instead, and one warning says why.
    """
    if check_name(name) == "reference":
        from .. import reference

        return reference
    from . import torch

    if name == "torch" or (name is None and x.device.type != "cuda"):
        return torch
    obstacle = find_obstacle(x.device.type, x.device.index, str(x.dtype))
    if obstacle is None:
        from . import triton

        return triton
    error, message = obstacle
    if name == "triton":
        raise error(message)
    warn_once(f"{message}; the torch backend serves instead")
    return torch


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
