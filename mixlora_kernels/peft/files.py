"""Saved adapters: their tensors are compared with what the model needs before anything is made or changed.

A file's header tells names, shapes and dtypes; the values are then read one tensor at a time.
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

# What weights are saved in, in the words of a safetensors header. Others (integers, float8) are no adapter's.
FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class Expected(NamedTuple):
    """What the model needs of one tensor: its shape (None: any), the dtype it will be kept in, and whether it is the
    adapter's own (or else of one of ``modules_to_save``)."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype = torch.float32
    own: bool = True


UNNAMED = Expected(shape=None)  # one of the adapter's own, under a name that is mapped to the model's later


class Given(NamedTuple):
    """What a file says of one tensor, and how to read it. ``dtype`` is a torch dtype where it is one of ``FLOATING``,
    and otherwise the file's word for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]


def check_weights(file: Path, expected: Mapping[str, Expected], adapter_name: str, prefix: str) -> None:
    """Look at a file of weights, without loading it.

    Args:
        file: ``.safetensors``, or what ``torch.save`` wrote.
        expected: by the names in the model, without the adapter's name.
        prefix: what the keys of the file must begin with; "" where ``base_model.model.`` may be left out.

    Raises:
        ValueError: as ``check_fits``, or the file cannot be read as what it is said to be.
    """
    with opened(file) as given:
        check_fits(expected, without_prefix(given, prefix), adapter_name, names_may_change=True)


@contextmanager
def opened(file: Path) -> Iterator[dict[str, Given]]:
    """The tensors of a file, of which only the header has been read.

    Raises:
        ValueError: it is no whole file of its kind, or holds something else than tensors by name.
    """
    if not file.is_file():
        raise ValueError(
            f"{file} is no file; nothing was loaded. (transformers' load_adapter reads a local adapter_model.bin with "
            "use_safetensors=False)"
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
        if start[:2] == b"PK" or start[:1] == b"\x80":  # torch.save's archive, or a bare pickle
            what = "is a pickle, not a safetensors file"
        raise ValueError(f"{file} {what} ({error}); nothing was loaded") from error


def _mapped(file: Path) -> object:
    """What ``torch.save`` wrote, its tensors mapped from the file instead of read; nothing but tensors and plain
    values is unpickled."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has no error of its own for a broken file
        raise ValueError(f"{file} is not what torch.save writes, or truncated or corrupt ({error})") from error


def describe(tensors: object, where: str = "") -> dict[str, Given]:
    """Tensors in memory, as ``opened`` gives those of a file.

    Raises:
        ValueError: it is no dictionary of dense tensors by name.
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
    """The tensors by their names in the model. A key without the prefix keeps it as a mark of what it lacks."""
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
    """Compare what an adapter needs with what is there for it.

    Args:
        names_may_change: the names of the adapter's own tensors may differ, as long as each has a counterpart of its
            kind and shape: both libraries can map the names of older models to newer ones, and the names are compared
            again after that.

    Raises:
        ValueError: a tensor is missing, superfluous, of another shape or dtype, or has values that are not finite
            numbers. All that are found are named: names, shapes and dtypes first, and values where those are right.
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
    return not isinstance(given.dtype, torch.dtype)  # a counter or mask of modules_to_save


def _is_finite(given: Given, dtype: torch.dtype) -> bool:
    if not dtype.is_floating_point:
        return True
    # As they will be kept: 1e300 is finite in float64 and infinite in float32.
    return all(bool(part.to(dtype).isfinite().all()) for part in given.read().flatten().split(1 << 22))


def refuse(adapter_name: str, missing: Iterable, unknown: Iterable, shapes: Iterable, dtypes: Iterable = ()) -> None:
    """Raise a ValueError where one of the lists has an entry.

    Args:
        missing, unknown: names.
        shapes: name, shape in the file, shape in the model.
        dtypes: name, dtype in the file.
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
