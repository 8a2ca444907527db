"""MME: compute the scores of its official tool, and write files that the tool can read.

A results folder has a ``.txt`` file for each subtask, with lines ``image<TAB>question<TAB>ground truth<TAB>response``.
Each two consecutive lines are about one image.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from ..refusal import Missing, Refusal

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read_answer(response: str) -> str:
    """``"yes"``, ``"no"`` or ``"other"``, from the first four characters of a response.

    As in the official tool, the letters also count inside a word: "know" is a no.
    """
    start = response.lower()[:4]
    return next((answer for answer in ("yes", "no") if answer in start), "other")


def score_subtask(lines: list[str], name: str = "subtask") -> dict[str, float | int]:
    """Score one subtask.

    If all answers are ``other``, the score is 0. The tool prints this score with older releases of scikit-learn, and
    stops with newer ones.

    Args:
        lines: the lines of the subtask's file, in order.
        name: the subtask's name, for messages.

    Returns:
        ``score``, which is ``acc + acc_plus`` in percent (at most 200); ``acc``, the part of questions that were
        answered right, and ``acc_plus``, the part of images with both answers right, both from 0 to 1; the number of
        ``questions`` and of ``other`` answers.

    Raises:
        ValueError: there are no lines, or an odd number of lines; a line does not have four fields; or a ground truth
            is neither yes nor no. The official tool stops in these cases too.
    """
    answers = []
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) != 4:
            raise Refusal(
                f"{name}, line {number}: needs the four fields image, question, ground truth and response with a tab "
                f"between each, got {len(fields)}: {line!r}"
            )
        truth = fields[2].lower()
        if truth not in ("yes", "no"):
            raise Refusal(f"{name}, line {number}: the ground truth must be yes or no, got {fields[2]!r}")
        answers.append((truth, read_answer(fields[3])))
    if not lines or len(lines) % 2:
        raise Refusal(f"{name}: two lines belong to each image, got {len(lines)} lines in all")
    right = [truth == answer for truth, answer in answers]
    acc = sum(right) / len(right)
    acc_plus = sum(one and other for one, other in zip(right[::2], right[1::2])) / (len(right) // 2)
    return {
        "score": acc * 100 + acc_plus * 100,
        "acc": acc,
        "acc_plus": acc_plus,
        "questions": len(right),
        "other": sum(answer == "other" for _, answer in answers),
    }


def score_folder(folder: str | Path) -> dict:
    """Score the 14 subtasks of a results folder.

    Returns:
        ``perception`` (at most 2000), ``cognition`` (at most 800), their sum ``total``, and ``subtasks`` by name.

    Raises:
        FileNotFoundError: a subtask has no file.
        ValueError: a file is not UTF-8; or as ``score_subtask``.
    """
    files = {name: Path(folder, f"{name}.txt") for name in PERCEPTION + COGNITION}
    if missing := [file.name for file in files.values() if not file.is_file()]:
        raise Missing(f"{folder} lacks {', '.join(missing)}")
    subtasks = {}
    for name, file in files.items():
        try:
            # As in the official tool, a carriage return alone ends a line too.
            with file.open(encoding="utf-8") as stream:
                lines = stream.readlines()
        except UnicodeDecodeError as error:
            raise Refusal(f"{file} is not UTF-8: {error}") from error
        subtasks[name] = score_subtask(lines, file.name)
    perception = sum(subtasks[name]["score"] for name in PERCEPTION)
    cognition = sum(subtasks[name]["score"] for name in COGNITION)
    return {
        "perception": perception,
        "cognition": cognition,
        "total": perception + cognition,
        "subtasks": subtasks,
    }


def write_subtask(file: str | Path, predictions: Iterable[dict]) -> None:
    """Write predictions in the released format (see ``predict``) as the file of one MME subtask.

    Tabs and line breaks inside a field become spaces, because they would break the file's lines.

    Raises:
        ValueError: two consecutive predictions are of different images, or a target is not yes or no.
    """
    predictions = list(predictions)
    for one, other in zip(predictions[::2], predictions[1::2]):
        if one["image_path"] != other["image_path"]:
            raise Refusal(
                f"{file}: two consecutive questions belong to an image, got {one['question_id']} of "
                f"{one['image_path']} and {other['question_id']} of {other['image_path']}"
            )
    lines = []
    for row in predictions:
        truth = row["target"].strip()
        if truth.lower() not in ("yes", "no"):
            raise Refusal(f"{file}: {row['question_id']} needs the target yes or no, got {row['target']!r}")
        fields = (
            Path(row["image_path"]).name,
            row.get("metadata", {}).get("question", row["prompt"]),
            truth,
            row["predict"],
        )
        lines.append("\t".join(re.sub(r"[\t\r\n]", " ", field) for field in fields) + "\n")
    Path(file).write_text("".join(lines), encoding="utf-8")
