"""The backends, and the choice between them.

``torch`` and ``triton`` offer the same stages, each with its backward: ``project`` (x to the pool's products and
the routers' logits), ``route`` (logits to the choice of factors, with ``condition_table``) and ``expand`` (the
chosen products into y). The reference is a backend by name only: it has no stages.
"""

from types import ModuleType

from torch import Tensor

NAMES = ("reference", "torch", "triton")


def check_name(name: str | None) -> str | None:
    """Raise a ValueError unless ``name`` is a backend's or None."""
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))} or None, got {name!r}")
    return name


def select(name: str | None, x: Tensor) -> ModuleType:
    """The backend of that name, or for None the best one for x."""
    if check_name(name) == "reference":
        from .. import reference

        return reference
    from . import torch

    return torch
