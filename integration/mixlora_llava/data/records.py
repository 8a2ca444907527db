"""Read the records of LLaVA's JSON files one by one, so that an unreadable record does not affect the others."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..refusal import Refusal
from .conversation import BadRecord, Turn, read_turns
from .images import check_image, find_image
from .text import is_text, shown

LONGEST_NAME = 1000  # characters of a task's name, which is used as a key in files and as a label in plots
_SPACE = re.compile(r"[ \t\n\r]*")
_STEP = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)


class Record(NamedTuple):
    """One conversation. ``task`` is Vision-Flan's ``task_name``, ``image`` a file or None."""

    id: str
    task: str | None
    image: Path | None
    turns: list[Turn]


def read_entries(file: str | Path, limit: int | None = None) -> list[Any]:
    """The elements of a file's JSON list. An element that is nested too deeply to read, or has an integer with
    too many digits, becomes a ``BadRecord``.

    Bytes that are not UTF-8 become halves of surrogate pairs, which ``read_record`` refuses in texts that are used.

    Args:
        limit: stop after this number of elements, and do not read further.

    Raises:
        ValueError: the file is not a JSON list. The message gives the position of the error.
    """
    text = Path(file).read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    start = _after_space(text, 0)
    if text[start : start + 1] != "[":
        raise Refusal(f"{file} must hold a list of records in JSON, got {shown(text[start : start + 20])!r}")
    try:
        entries: list[Any] = []
        for entry in _elements(text, start + 1):
            entries.append(entry)
            if len(entries) == limit:
                break
        return entries
    except json.JSONDecodeError as error:
        raise Refusal(f"{file} is not JSON: {error}") from error


def _elements(text: str, at: int) -> Iterator[Any]:
    """Yield the elements of the list that begins before ``at``, and check that the text ends after the list."""
    decoder = json.JSONDecoder()
    at = _after_space(text, at)
    while text[at : at + 1] != "]":
        try:
            entry, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            raise
        except RecursionError:
            entry, at = BadRecord("nested too deeply"), _end_of_element(text, at)
        except ValueError:  # an integer has more digits than Python reads
            entry, at = BadRecord("an integer of too many digits"), _end_of_element(text, at)
        yield entry
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
            if text[at : at + 1] == "]":
                raise json.JSONDecodeError("Expecting value", text, at)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    at = _after_space(text, at + 1)
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # the pattern matches the empty text
    return found.end()


def _end_of_element(text: str, at: int) -> int:
    """Find the end of an element that the decoder cannot read, by counting brackets."""
    depth = 0
    for step in _STEP.finditer(text, at):
        token = step.group()
        if depth == 0 and token in (",", "]"):
            return step.start()
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token, 0)
    raise json.JSONDecodeError("Unterminated element", text, at)


def name_of(number: int, entry: object) -> str:
    """The name of a record in reports: its id as printable text, or its position in the file if it has no id."""
    given = entry.get("id") if isinstance(entry, dict) else None
    return shown(str(given)) if _is_id(given) else f"#{number}"


def read_record(number: int, entry: object, images: str | Path, decode: bool) -> tuple[Record, tuple[int, int] | None]:
    """Read a record, and its image's width and height.

    Raises:
        BadRecord, BadImage: the record cannot be used.
    """
    if isinstance(entry, BadRecord):
        raise entry
    if not isinstance(entry, dict):
        raise BadRecord("not a record")
    if entry.get("id") is not None and not _is_id(entry["id"]):
        raise BadRecord("id is neither a text nor an integer")
    image, task = entry.get("image"), entry.get("task_name")
    if image is not None and not isinstance(image, str):
        raise BadRecord("image is not the name of a file")
    if task is not None and not is_text(task):
        raise BadRecord("task_name is not a text")
    if task is not None and len(task) > LONGEST_NAME:
        raise BadRecord(f"task_name of more than {LONGEST_NAME} characters")
    turns = read_turns(entry.get("conversations"), image is not None)
    file, size = None, None
    if image is not None:
        file = find_image(images, image)
        size = check_image(file, decode)
    return Record(name_of(number, entry), task, file, turns), size


def _is_id(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))
