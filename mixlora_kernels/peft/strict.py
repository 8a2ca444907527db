"""transformers' own ``load_adapter``, made to refuse what it would only report."""

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
    """In the place of the function by which transformers' own ``load_adapter`` loads weights: the same, but what it
    would report in its log, and leave at random values, is refused, and the adapter taken out again.

    Args:
        load: transformers' function; returns its report and what it left on disk.
        tuner: what has injected the adapter.
        expected: what the adapter consists of.

    Raises:
        ValueError: as ``check_fits``, of the very files that are loaded.
    """
    tuner.model.__dict__.pop(LOADING, None)  # for this call alone
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
    except Exception:  # whatever it was, the model is put back as it was, and the error goes on
        tuner.withdraw(adapter_name)
        raise
    tuner.forget()
    return found, offloaded
