"""Decide whether a prediction is right, by comparing words exactly."""

import unicodedata
from collections.abc import Callable

EXACT = "exact"
# A judge decides for rows of the released format: True for right, False for wrong, None for unclear.
Judge = Callable[[list[dict]], list[bool | None]]


def exact(rows: list[dict]) -> list[bool]:
    """Whether prediction and target are the same words, apart from case, articles, and punctuation around words. The
    sign of a number, and what stands within a word, such as a decimal point, count."""
    return [_words(row["predict"]) == _words(row["target"]) for row in rows]


def _words(text: str) -> list[str]:
    words = unicodedata.normalize("NFC", text).lower().split()
    bare = [bare for word in words if (bare := _bare(word))] or words  # an answer may be a sign alone
    return [word for word in bare if word not in ("a", "an", "the")] or bare


def _bare(word: str) -> str:
    """The word without the punctuation around it."""
    while word and unicodedata.category(word[-1]).startswith("P"):
        word = word[:-1]
    while word and unicodedata.category(word[0]).startswith("P") and not (word[0] in "-." and word[1:2].isdigit()):
        word = word[1:]
    return word
