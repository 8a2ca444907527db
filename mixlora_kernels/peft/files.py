"""Saved adapters: a file must be whole, and it must fit the model it is loaded into."""

from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor


def check_weights_file(folder: str | Path, subfolder: str | None = None) -> None:
    """Read the header of a local ``adapter_model.safetensors``, which tells the length the file must have.

    Raises:
        ValueError: it is no whole safetensors file.
    """
    file = Path(folder, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
    if not file.is_file():
        return  # from the hub, or saved in another format: peft's business
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
    problems = []
    if missing := sorted(expected.keys() - given.keys()):
        problems.append(f"missing keys: {missing}")
    if unknown := sorted(given.keys() - expected.keys()):
        problems.append(f"unknown keys: {unknown}")
    if shapes := [
        f"{key}: {tuple(given[key].shape)} in the file, {tuple(expected[key].shape)} in the model"
        for key in sorted(expected.keys() & given.keys())
        if given[key].shape != expected[key].shape
    ]:
        problems.append(f"other shapes: {shapes}")
    if problems:
        raise ValueError(
            f"the weights do not fit adapter {adapter_name!r}, and nothing was loaded. " + "; ".join(problems)
        )
