"""POPE: compute the figures of its official script.

Each line of an answers file is a JSON object with ``answer``, and each line of a labels file one with ``label``.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ..refusal import Refusal
from .answers import failed


def says_yes(answer: str) -> bool:
    """Whether an answer counts as yes: its first sentence does not have the words No, no or not.

    As in the script, commas are removed and words are separated by spaces, so that "NO" and "No!" count as yes.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"}.intersection(words)


def score(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float | int | None]:
    """Compute the script's figures.

    Args:
        answers: the model's answers.
        labels: ``"no"``, or any other text for yes.

    Returns:
        ``accuracy``, ``precision``, ``recall``, ``f1`` and ``yes_ratio`` from 0 to 1, and the counts. As in the script,
        if there are more answers than labels or the reverse, the surplus is not paired, but the yes-ratio counts all
        answers. ``unpaired`` is the size of the surplus. A figure that would be 0 / 0 is None; the script stops there.

    Raises:
        ValueError: there is nothing to score, or an answer is not text.
    """
    if not answers or not labels:
        raise Refusal(f"nothing to score: {len(answers)} answers and {len(labels)} labels")
    for number, answer in enumerate(answers, 1):
        if not isinstance(answer, str):
            raise Refusal(f"answer {number} must be a text, got {answer!r}")
    return {**_figures(answers, labels), "unpaired": abs(len(answers) - len(labels))}


def _figures(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float | int | None]:
    """The script's figures. A figure that would be 0 / 0 is None."""
    said = [says_yes(answer) for answer in answers]
    pairs = list(zip(said, (label != "no" for label in labels)))
    tp, fp, tn, fn = (
        pairs.count(pair) for pair in ((True, True), (True, False), (False, False), (False, True))
    )  # fmt: skip
    precision = tp / (tp + fp) if tp + fp else None
    recall = tp / (tp + fn) if tp + fn else None
    f1 = 2 * precision * recall / (precision + recall) if precision and recall else None
    return {
        "accuracy": (tp + tn) / len(pairs) if pairs else None,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": said.count(True) / len(said) if said else None,
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
    }


def score_predictions(rows: Sequence[dict]) -> dict[str, float | int | None]:
    """Score predictions in the released format; their targets may be written Yes and No.

    Rows whose image could not be used are left out, because the script would count their empty answers as yes.

    Returns:
        As ``score``, with ``errors``, the number of these rows, in the place of ``unpaired``. If no row is left, the
        figures are None.
    """
    answered = [row for row in rows if not failed(row)]
    figures = _figures([row["predict"] for row in answered], [row["target"].strip().lower() for row in answered])
    return {**figures, "errors": len(rows) - len(answered)}


def read_field(file: str | Path, field: str) -> list[str]:
    """Read one field of each line of a JSONL file.

    Raises:
        ValueError: the file is not UTF-8, or a line is not a JSON object with this field.
    """
    try:
        with Path(file).open(encoding="utf-8") as stream:  # as in the script, a carriage return alone ends a line too
            lines = stream.readlines()
    except UnicodeDecodeError as error:
        raise Refusal(f"{file} is not UTF-8: {error}") from error
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line)[field])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise Refusal(f"{file}, line {number}: no JSON object with {field!r}") from error
    return values
