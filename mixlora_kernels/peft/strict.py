"""Make transformers' own ``load_adapter`` refuse weights that it would only report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import Expected, check_fits, check_weights, describe, refuse, without_prefix
from .registration import LOADING

if TYPE_CHECKING:
    from .model import ConditionalMixLoRAModel


def load_strictly(
    load: Callable,
    tuner: "ConditionalMixLoRAModel",
    adapter_name: str,
    expected: Mapping[str, Expected],
    *args: Any,
    checkpoint_files: list[str] | None = None,
    state_dict: Mapping | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load weights as transformers' own ``load_adapter`` does, but refuse weights that do not fit.

    It replaces the function by which ``load_adapter`` loads weights. That function would log missing weights and leave
    them random. This one raises an error and removes the adapter.

    Args:
        load: transformers' function. It returns its report, and the weights that it left on disk.
        tuner: the tuner that has injected the adapter.
        expected: the adapter's tensors by name.

    Raises:
        ValueError: as ``check_fits``, for the files that are loaded.
    """
    tuner.model.__dict__.pop(LOADING, None)  # it replaces the function for one call
    try:
        for file in map(Path, checkpoint_files or ()):
            check_weights(file, expected, adapter_name, prefix="")
        if state_dict is not None:
            check_fits(expected, without_prefix(describe(state_dict), ""), adapter_name, names_may_change=True)
        found, offloaded = load(*args, checkpoint_files=checkpoint_files, state_dict=state_dict, **kwargs)
        mark = f".{tuner.prefix}"
        missing = {key for key in found.missing_keys if mark in key and f".{adapter_name}." in key}
        unknown = {key for key in found.unexpected_keys if mark in key}
        refuse(adapter_name, missing, unknown, found.mismatched_keys)
    except Exception:  # after any error the model is restored
        tuner.withdraw(adapter_name)
        raise
    tuner.forget()
    return found, offloaded
