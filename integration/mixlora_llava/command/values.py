"""The types of the arguments' values.

Each type converts a text, and finds what is wrong with the value. Values are checked after the whole command line was
read, so that ``--help`` answers whatever stands before it, and before the command loads anything.
"""

import argparse
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

from ..places import in_the_way
from ..refusal import Refusal


class Kind:
    """A type for ``argparse``.

    Args:
        convert: converts the text of a value.
        fault: returns what is wrong with a value and what it must be, or None for a value that can be used.
    """

    def __init__(self, convert: Callable[[str], Any], fault: Callable[[Any], str | None]):
        self.convert, self.fault = convert, fault
        self.__name__ = convert.__name__  # argparse names it where a text cannot be converted

    def __call__(self, text: str) -> Any:
        return self.convert(text)


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Check all values of a command line.

    Raises:
        Refusal: a value cannot be used. The message names its argument.
    """
    for action in parser._actions:
        given = getattr(options, action.dest, None)
        if isinstance(action.type, Kind) and given is not None:
            for value in given if isinstance(given, list) else [given]:
                if fault := action.type.fault(value):
                    raise Refusal(f"{action.option_strings[0] if action.option_strings else action.dest} {fault}")


def takes_path(action: argparse.Action) -> bool:
    """Whether an argument's value is a path."""
    return getattr(action.type, "convert", action.type) is Path


def _no_folder(folder: Path) -> str | None:
    return (
        None
        if folder.is_dir()
        else f"must be a folder, and {folder} is " + ("a file" if folder.exists() else "missing")
    )


def _no_file(file: Path) -> str | None:
    return None if file.is_file() else f"must be a file, and {file} is " + ("a folder" if file.exists() else "missing")


def _no_place(folder: Path) -> str | None:
    file = in_the_way(folder)
    return None if file is None else f"must be a folder, and {file} is a file: give another folder"


def _no_device(name: str) -> str | None:
    import torch

    try:
        kind = torch.zeros(1, device=name).device.type
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return f"must be a torch device of this machine, got {name!r} ({str(error).partition(chr(10))[0]})"
    return f"must be a torch device that computes, got {name!r}" if kind == "meta" else None


def _at_least_one(number: int) -> str | None:
    return None if number >= 1 else f"must be at least 1, got {number}"


def _above_zero(number: float) -> str | None:
    return None if 0 < number < inf else f"must be a number above 0, got {number}"


count = Kind(int, _at_least_one)
amount = Kind(float, _above_zero)
folder = Kind(Path, _no_folder)
file = Kind(Path, _no_file)
place = Kind(Path, _no_place)  # a folder that is made if it is missing
device = Kind(str, _no_device)
