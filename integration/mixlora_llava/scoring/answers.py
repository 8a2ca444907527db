"""Read and write a file of answers, with an answer in the released format, a JSON object, in each line."""

import json
from pathlib import Path

from ..refusal import Refusal

ERROR = "error"  # the field of an answer's metadata that says why its image could not be used


def read_answers(file: str | Path) -> list[dict]:
    """Read the complete lines of a file, without an incomplete last line of a stopped run.

    Raises:
        ValueError: a line is not an answer in the released format.
    """
    if not Path(file).is_file():
        return []
    content = Path(file).read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
        for row in rows:
            row["metadata"].get(ERROR), row["question_id"], row["prompt"], row["target"], row["model_id"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refusal(f"{file} is no file of answers ({error!r}): give another output, or delete it") from error
    return rows


def write_answers(file: str | Path, rows: list[dict]) -> None:
    """Write answers in the place of those in the file, all of them or, if the run is killed, none."""
    part = Path(f"{file}.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    part.replace(file)


def failed(row: dict) -> bool:
    """Whether the image could not be used, so that there is no answer."""
    return ERROR in row.get("metadata", {})
