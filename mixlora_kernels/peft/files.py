"""Saved adapters: a file must be whole, and it must fit the model it is loaded into."""

from collections.abc import Callable, Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

LOADING = "_load_pretrained_model"  # of a transformers model: what its load_adapter() loads weights by


def check_weights_file(file: Path) -> None:
    """Read the header of a safetensors file, which tells the length the file must have.

    Raises:
        ValueError: it is no whole safetensors file.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        with file.open("rb") as stream:
            start = stream.read(4)
        what = "is truncated or corrupt"
        if start[:2] == b"PK" or start[:1] == b"\x80":  # torch.save's archive, or a bare pickle
            what = "is a pickle, not a safetensors file"
        raise ValueError(f"{file} {what} ({error}); nothing was loaded") from error


def check_fits(expected: dict[str, Tensor], given: dict[str, Tensor], adapter_name: str) -> None:
    """Compare what an adapter has in memory with what a file brings for it.

    Raises:
        ValueError: a tensor is missing, superfluous or of another shape; all of them are named.
    """
    common = expected.keys() & given.keys()
    shapes = [(key, given[key].shape, expected[key].shape) for key in common if given[key].shape != expected[key].shape]
    _refuse_unless_empty(adapter_name, expected.keys() - given.keys(), given.keys() - expected.keys(), shapes)


def load_strictly(load: Callable, tuner, adapter_name: str, *args, checkpoint_files: list[str] | None = None, **kwargs):
    """In the place of the function by which transformers' own ``load_adapter`` loads weights: the same, but what it
    would report in its log, and leave at random values, is refused, and the adapter taken out again.

    Args:
        load: transformers' function; returns its report and what it left on disk.
        tuner: what has injected the adapter.

    Raises:
        ValueError: a file is no whole safetensors file; or a tensor is missing, superfluous or of another shape, and
            all of them are named.
    """
    vars(tuner.model).pop(LOADING, None)  # for this call alone
    try:
        for file in map(Path, checkpoint_files or ()):
            if file.suffix == ".safetensors":
                check_weights_file(file)
        found, offloaded = load(*args, checkpoint_files=checkpoint_files, **kwargs)
        mark = f".{tuner.prefix}"
        missing = {key for key in found.missing_keys if mark in key and f".{adapter_name}." in key}
        unknown = {key for key in found.unexpected_keys if mark in key}
        _refuse_unless_empty(adapter_name, missing, unknown, found.mismatched_keys)
    except Exception:  # whatever it was, the model is put back as it was, and the error goes on
        tuner.withdraw(adapter_name)
        raise
    return found, offloaded


def _refuse_unless_empty(adapter_name: str, missing: Collection, unknown: Collection, shapes: Collection) -> None:
    problems = []
    if missing:
        problems.append(f"missing keys: {sorted(missing)}")
    if unknown:
        problems.append(f"unknown keys: {sorted(unknown)}")
    if shapes:
        described = [f"{key}: {tuple(a)} in the file, {tuple(b)} in the model" for key, a, b in sorted(shapes)]
        problems.append(f"other shapes: {described}")
    if problems:
        raise ValueError(
            f"the weights do not fit adapter {adapter_name!r}, and nothing was loaded. " + "; ".join(problems)
        )
