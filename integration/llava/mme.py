"""MME: the scores of its official tool, and files that the tool itself can read.

    python -m integration.llava.mme RESULTS_DIR

A results folder holds a ``.txt`` per subtask with lines ``image<TAB>question<TAB>ground truth<TAB>response``. Two
consecutive lines share an image.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read_answer(response: str) -> str:
    """``"yes"``, ``"no"`` or ``"other"``, from the first four characters of a response.

    What stands there counts even inside a word, as in the official tool: "know" is a no.
    """
    start = response.lower()[:4]
    return next((answer for answer in ("yes", "no") if answer in start), "other")


def score_subtask(lines: list[str], name: str = "subtask") -> dict[str, float | int]:
    """Score one subtask.

    Args:
        lines: of its file, in order. A line that has not four fields is left out of the accuracy, and its image
            cannot be right as a whole.
        name: for messages.

    Returns:
        ``score``, which is ``acc + acc_plus`` in percent (at most 200); ``acc``, the share of questions answered
        right, and ``acc_plus``, the share of images with both questions right, both within 0 to 1; the number of
        ``questions``, of ``other`` answers and of ``malformed`` lines.

    Raises:
        ValueError: where the official tool stops as well: an odd number of lines, a ground truth other than yes and
            no, or no line that can be read.
    """
    if len(lines) % 2:
        raise ValueError(f"{name}: two lines belong to an image, got an odd number, {len(lines)}")
    right = answered = other = malformed = whole_images = 0
    for first in range(0, len(lines), 2):
        right_of_image = 0
        for number, line in enumerate(lines[first : first + 2], first + 1):
            fields = line.split("\t")
            if len(fields) != 4:
                malformed += 1
                continue
            truth, answer = fields[2].lower(), read_answer(fields[3])
            if truth not in ("yes", "no"):
                raise ValueError(f"{name}, line {number}: the ground truth must be yes or no, got {fields[2]!r}")
            answered += 1
            other += answer == "other"
            right_of_image += truth == answer
        right += right_of_image
        whole_images += right_of_image == 2
    if not answered:
        raise ValueError(f"{name}: no line of the four fields image, question, ground truth, response")
    acc, acc_plus = right / answered, whole_images / (len(lines) // 2)
    return {
        "score": acc * 100 + acc_plus * 100,
        "acc": acc,
        "acc_plus": acc_plus,
        "questions": answered,
        "other": other,
        "malformed": malformed,
    }


def score_folder(folder: str | Path) -> dict:
    """Score the 14 subtasks of a results folder.

    Returns:
        ``perception`` (at most 2000), ``cognition`` (at most 800), their sum ``total``, and ``subtasks`` by name.

    Raises:
        FileNotFoundError: a subtask has no file. ValueError: see ``score_subtask``.
    """
    subtasks = {}
    for name in PERCEPTION + COGNITION:
        # As in the official tool, a carriage return alone ends a line too.
        with Path(folder, f"{name}.txt").open(encoding="utf-8") as stream:
            subtasks[name] = score_subtask(stream.readlines(), f"{name}.txt")
    perception = sum(subtasks[name]["score"] for name in PERCEPTION)
    cognition = sum(subtasks[name]["score"] for name in COGNITION)
    return {
        "perception": perception,
        "cognition": cognition,
        "total": perception + cognition,
        "subtasks": subtasks,
    }


def write_subtask(file: str | Path, predictions: Iterable[dict]) -> None:
    """Write predictions in the released format (see ``evaluate``) as the file of one MME subtask.

    Tabs and line breaks inside a field would break the file's lines, and become spaces.

    Raises:
        ValueError: two consecutive predictions are of different images, or a target is not yes or no.
    """
    predictions = list(predictions)
    for one, other in zip(predictions[::2], predictions[1::2]):
        if one["image_path"] != other["image_path"]:
            raise ValueError(
                f"{file}: two consecutive questions belong to an image, got {one['question_id']} of "
                f"{one['image_path']} and {other['question_id']} of {other['image_path']}"
            )
    lines = []
    for row in predictions:
        truth = row["target"].strip()
        if truth.lower() not in ("yes", "no"):
            raise ValueError(f"{file}: {row['question_id']} needs the target yes or no, got {row['target']!r}")
        fields = (
            Path(row["image_path"]).name,
            row.get("metadata", {}).get("question", row["prompt"]),
            truth,
            row["predict"],
        )
        lines.append("\t".join(re.sub(r"[\t\r\n]", " ", field) for field in fields) + "\n")
    Path(file).write_text("".join(lines), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="folder with a .txt per subtask")
    print(json.dumps(score_folder(parser.parse_args(arguments).results), indent=2))


if __name__ == "__main__":
    main()
