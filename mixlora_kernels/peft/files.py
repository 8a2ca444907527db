"""Check the tensors of a saved adapter against the model before anything is changed.

Names, shapes and dtypes are read from a file's header. The values are read one tensor at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# The dtypes of an adapter's weights, by their names in a safetensors header. Other dtypes (integers, float8) are
# refused.
FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Expected(NamedTuple):
    """What the model needs of one tensor: its shape (None: any), the dtype that the model keeps it in, and whether it
    belongs to the adapter itself (False: to one of ``modules_to_save``)."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype = torch.float32
    own: bool = True


UNNAMED = Expected(shape=None)  # an adapter's tensor whose name is mapped to the model's later


class Given(NamedTuple):
    """One tensor of a file, and a function that reads it. ``dtype`` is a torch dtype if ``FLOATING`` has it, and the
    file's name for it otherwise."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]


def check_weights(file: Path, expected: Mapping[str, Expected], adapter_name: str, prefix: str) -> None:
    """Check a file of weights without loading it into the model.

    Args:
        file: a ``.safetensors`` file, or one that ``torch.save`` wrote.
        expected: the model's tensors by name, without the adapter's name.
        prefix: the prefix that the keys of the file must have; "" if ``base_model.model.`` is optional.

    Raises:
        ValueError: as ``check_fits``, or the file cannot be read as its kind.
    """
    with opened(file) as given:
        check_fits(expected, without_prefix(given, prefix), adapter_name, names_may_change=True)


@contextmanager
def opened(file: Path) -> Iterator[dict[str, Given]]:
    """Yield the tensors of a file by name. Only the header is read.

    Raises:
        ValueError: the file is missing, is not a complete file of its kind, or holds other things than tensors by name.
    """
    if not file.is_file():
        raise ValueError(
            f"{file} is not a file; nothing was loaded. (transformers' load_adapter reads a local "
            "adapter_model.bin with use_safetensors=False)"
        )
    if file.suffix != ".safetensors":
        yield describe(_mapped(file), f"{file}: ")
        return
    try:
        with safe_open(file, framework="pt") as archive:
            names = list(archive.keys())
            headers = {name: archive.get_slice(name) for name in names}
            yield {
                name: Given(
                    shape=tuple(header.get_shape()),
                    dtype=FLOATING.get(header.get_dtype(), header.get_dtype()),
                    read=partial(archive.get_tensor, name),
                )
                for name, header in headers.items()
            }
    except (SafetensorError, OSError) as error:
        with file.open("rb") as stream:
            start = stream.read(4)
        what = "is truncated or corrupt"
        if start[:2] == b"PK" or start[:1] == b"\x80":  # torch.save's zip archive, or a pickle
            what = "is a pickle, not a safetensors file"
        raise ValueError(f"{file} {what} ({error}); nothing was loaded") from error


def _mapped(file: Path) -> object:
    """Open a file that ``torch.save`` wrote. Its tensors are memory-mapped, and only tensors and plain values are
    unpickled."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises various errors for a broken file
        raise ValueError(f"{file} is not what torch.save writes, or truncated or corrupt ({error})") from error


def describe(tensors: object, where: str = "") -> dict[str, Given]:
    """Tensors in memory in the form in which ``opened`` yields those of a file.

    Raises:
        ValueError: ``tensors`` is not a dictionary of dense tensors by name.
    """
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{where}an adapter's weights are tensors by name, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            what = getattr(tensor, "layout", type(tensor).__name__)
            raise ValueError(f"{where}an adapter's weights are dense tensors by name, got {what} by {name!r}")
    return {
        name: Given(
            shape=tuple(tensor.shape),
            dtype=tensor.dtype if tensor.dtype in FLOATING.values() else str(tensor.dtype).removeprefix("torch."),
            read=partial(tensors.__getitem__, name),
        )
        for name, tensor in tensors.items()
    }


def without_prefix(given: Mapping[str, Given], prefix: str) -> dict[str, Given]:
    """The tensors by their names in the model. A key that lacks the prefix is named so, and then matches nothing."""
    optional = "base_model.model."
    if not prefix:
        return {name.removeprefix(optional): entry for name, entry in given.items()}
    return {
        name.removeprefix(prefix) if name.startswith(prefix) else f"{name} (without {prefix!r})": entry
        for name, entry in given.items()
    }


def check_fits(
    expected: Mapping[str, Expected],
    given: Mapping[str, Given],
    adapter_name: str,
    names_may_change: bool = False,
) -> None:
    """Compare the tensors that an adapter needs with those that are given.

    Args:
        names_may_change: whether the names of the adapter's own tensors may differ, if each has a counterpart of its
            kind and shape. peft and transformers can map the names of older models to newer ones, and the names are
            compared again afterwards.

    Raises:
        ValueError: a tensor is missing or unknown, has another shape or dtype, or has values that are not finite. The
            message lists all wrong names, shapes and dtypes; if there are none, it lists the tensors that are not
            finite.
    """
    missing, unknown = expected.keys() - given.keys(), given.keys() - expected.keys()
    mapped = names_may_change and all(expected[name].own for name in missing)
    if mapped and _kinds(expected, missing) == _kinds(given, unknown):
        missing, unknown = set(), set()
    pairs = {name: (given[name], expected.get(name, UNNAMED)) for name in sorted(given.keys() - unknown)}
    refuse(
        adapter_name,
        missing,
        unknown,
        [(name, a.shape, b.shape) for name, (a, b) in pairs.items() if b.shape is not None and a.shape != b.shape],
        [(name, a.dtype) for name, (a, b) in pairs.items() if not _is_dtype_right(a, b)],
    )
    bad = [name for name, (a, b) in pairs.items() if not _is_finite(a, b.dtype)]
    if bad:
        raise ValueError(
            f"the weights do not fit adapter {adapter_name!r}, and nothing was loaded. Not finite: {_name(bad)}. "
            "Take a checkpoint from before the training diverged"
        )


def _kinds(tensors: Mapping[str, Expected | Given], names: Iterable[str]) -> Counter:
    return Counter((name.rpartition(".")[2], tensors[name].shape) for name in names)


def _is_dtype_right(given: Given, expected: Expected) -> bool:
    if expected.dtype.is_floating_point:
        return isinstance(given.dtype, torch.dtype)
    return not isinstance(given.dtype, torch.dtype)  # for example a counter or a mask of modules_to_save


def _is_finite(given: Given, dtype: torch.dtype) -> bool:
    if not dtype.is_floating_point:
        return True
    # In the dtype that the model keeps: 1e300 is finite in float64 and infinite in float32.
    return all(bool(part.to(dtype).isfinite().all()) for part in given.read().flatten().split(1 << 22))


def refuse(adapter_name: str, missing: Iterable, unknown: Iterable, shapes: Iterable, dtypes: Iterable = ()) -> None:
    """Raise a ValueError if one of the lists has an entry.

    Args:
        missing, unknown: names.
        shapes: for each wrong one, its name, its shape in the file and its shape in the model.
        dtypes: for each wrong one, its name and its dtype in the file.
    """
    problems = []
    if missing:
        problems.append(f"missing keys: {_name(missing)}")
    if unknown:
        problems.append(
            f"unknown keys: {_name(unknown)} (an adapter brings its own weights and those of its modules_to_save)"
        )
    if shapes:
        described = [f"{name}: {tuple(a)} in the file, {tuple(b)} in the model" for name, a, b in sorted(shapes)]
        problems.append(f"other shapes: {_name(described)}")
    if dtypes:
        problems.append(f"other dtypes: {_name([f'{name}: {dtype}' for name, dtype in dtypes])}")
    if problems:
        raise ValueError(
            f"the weights do not fit adapter {adapter_name!r}, and nothing was loaded. " + "; ".join(problems)
        )


def _name(names: Iterable[str], most: int = 50) -> str:
    names = sorted(names)
    return str(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
