"""Decide whether a prediction is right, by comparing words exactly."""

import re
from collections.abc import Callable

EXACT = "exact"
# A judge decides for rows of the released format: True for right, False for wrong, None for unclear.
Judge = Callable[[list[dict]], list[bool | None]]


def exact(rows: list[dict]) -> list[bool]:
    """Whether prediction and target are the same words, apart from case, punctuation and articles."""
    return [_words(row["predict"]) == _words(row["target"]) for row in rows]


def _words(text: str) -> list[str]:
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    return [word for word in words if word not in ("a", "an", "the")] or words
