"""Whether a prediction is right, without a judge: the exact comparison of words."""

import re
from collections.abc import Callable

EXACT = "exact"
# Decides for rows of the released format: True right, False wrong, None when the judge said neither.
Judge = Callable[[list[dict]], list[bool | None]]


def exact(rows: list[dict]) -> list[bool]:
    """Whether prediction and target are the same words, whatever their case, punctuation and articles."""
    return [_words(row["predict"]) == _words(row["target"]) for row in rows]


def _words(text: str) -> list[str]:
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    return [word for word in words if word not in ("a", "an", "the")] or words
