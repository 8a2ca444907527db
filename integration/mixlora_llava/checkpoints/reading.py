"""Read the tensors of a checkpoint one at a time, from any of its file formats. Only tensors are unpickled."""

import json
import pickle
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..refusal import Missing, Refusal

NAMES = ("pytorch_model.bin", "model.safetensors")


def find_files(checkpoint: str | Path) -> list[Path]:
    """Find the weight files of a checkpoint: one file, or several shards.

    Args:
        checkpoint: a folder, or one file.

    Raises:
        FileNotFoundError: there are no weight files, or a shard in the index is missing.
    """
    checkpoint = Path(checkpoint)
    if checkpoint.is_file():
        return [checkpoint]
    for name in NAMES:
        index = checkpoint / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [checkpoint / Path(shard).name for shard in shards]
            if missing := [file.name for file in files if not file.is_file()]:
                raise Missing(f"{checkpoint} lacks the shards {missing} that {index.name} names")
            return files
        if (checkpoint / name).is_file():
            return [checkpoint / name]
    raise Missing(f"{checkpoint} holds none of {', '.join(NAMES)} and no index of shards")


def stream(checkpoint: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a checkpoint with its key. Files are memory-mapped, so that only used tensors are read.

    Raises:
        FileNotFoundError: as ``find_files``.
        ValueError: a file is truncated or corrupt, or is a pickle with other things than tensors. The message names it.
    """
    for file in find_files(checkpoint):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.offset_keys():
                        yield key, tensors.get_tensor(key)
            except SafetensorError as error:
                raise Refusal(f"{file} is truncated or corrupt ({error})") from error
        else:
            state = load(file)
            if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
                raise Refusal(f"{file} is not a dictionary of tensors")
            yield from state.items()


def load(file: str | Path):
    """Load a file that torch saved, if it holds only tensors, plain values and a SimpleNamespace.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds anything else, or is truncated or corrupt.
    """
    if not Path(file).is_file():
        raise Missing(f"missing: {file}; give the folder of a released checkpoint")
    with Path(file).open("rb") as start:
        archive = start.read(2) == b"PK"
    if archive and not zipfile.is_zipfile(file):
        raise Refusal(f"{file} is truncated: its table of contents, at the end, is missing")
    try:
        with torch.serialization.safe_globals([types.SimpleNamespace]):
            # torch before 1.6 wrote bare pickles, which cannot be mapped.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise Refusal(f"{file} holds more than tensors and plain values, and was not loaded ({error})") from error
    except (RuntimeError, EOFError) as error:
        raise Refusal(f"{file} is truncated or corrupt ({error})") from error
