"""Answer files of questions, in the released format.

Questions are JSONL files, one for each task, with ``unique_id, image_path, prompt, target``. A stopped run resumes
where it stopped, if its answers were made in the same way; see ``resuming``.
"""

import json
import logging
import uuid
from pathlib import Path

from torch import Tensor, nn

from ..data.images import BadImage, find_image, load_image
from ..model.digest import model_digest, tensor_digest
from ..model.generate import answer, build_prompt
from ..refusal import Missing, Refusal
from .answers import ERROR, failed, read_answers, write_answers
from .resuming import DIGEST, IMAGE, OPTIONS, check_answers, image_digest

logger = logging.getLogger(__name__)
FIELDS = ("unique_id", "image_path", "prompt", "target")


def question_files(place: Path) -> list[Path]:
    """Find the files of questions, one for each task: all ``.jsonl`` files of a folder, or the given file.

    Raises:
        ValueError: there are no files.
    """
    files = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise Refusal(f"{place} is neither a file of questions nor a folder with files TASK.jsonl")
    return files


def read_questions(file: str | Path) -> list[dict]:
    """Read the questions of a task.

    Raises:
        ValueError: a line is not JSON, lacks a field, or has a field that is not text; an id occurs twice; or there are
            no questions.
    """
    questions, ids = [], set()
    with Path(file).open(encoding="utf-8") as stream:
        lines = list(stream)  # not splitlines(), which also splits at U+2028 within a text
    for number, line in enumerate(lines, 1):
        try:
            question = json.loads(line)
        except json.JSONDecodeError as error:
            raise Refusal(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(question, dict) or (missing := [name for name in FIELDS if name not in question]):
            raise Refusal(f"{file}, line {number}: lacks {missing if isinstance(question, dict) else FIELDS}")
        if wrong := [name for name in FIELDS[1:] if not isinstance(question[name], str)]:
            raise Refusal(f"{file}, line {number}: {wrong} must be texts")
        if not isinstance(question["unique_id"], str | int):
            raise Refusal(f"{file}, line {number}: unique_id must be a text or a whole number")
        if question["unique_id"] in ids:
            raise Refusal(f"{file}, line {number}: the id {question['unique_id']!r} occurs twice")
        ids.add(question["unique_id"])
        questions.append(question)
    if not questions:
        raise Refusal(f"{file} holds no questions: give a file with a question in each line")
    return questions


def read_tasks(place: Path, most: int) -> dict[str, list[dict]]:
    """Read the first ``most`` questions of each task, by the task's name; see ``question_files``."""
    return {file.stem: read_questions(file)[:most] for file in question_files(place)}


def predict(
    model: nn.Module,
    processor,
    questions: list[dict],
    images: str | Path,
    output: str | Path,
    *,
    batch_size: int = 8,
    template: str = "v1",
    model_id: str = "",
    embedding: Tensor | None = None,
    digest: str | None = None,
    max_new_tokens: int = 64,
    **options,
) -> list[dict]:
    """Answer questions, and write each batch's answers as lines of ``output``.

    If an image cannot be used, the answer is empty, which counts as wrong, and ``metadata`` gives the reason as
    ``error``. The next run asks such a question again.

    Args:
        images: the folder that ``image_path`` is relative to.
        output: a JSONL file. Answers that it already contains are kept.
        batch_size: the number of questions in a batch. It is 1 for adapters that average over padding, whose answers
            depend on padding.
        embedding: the task's embedding, for ``routing="task"``.
        digest: the model's ``model_digest``, if it is known. It is written to each answer's ``metadata``.
        max_new_tokens, options: see ``generate.answer``.

    Returns:
        All rows in the order of the questions: ``question_id, prompt, predict, target, image_path, answer_id,
        model_id, metadata``.

    Raises:
        ValueError: the file has answers to other questions, about other images, of another model or adapter, or of
            other options; or the folder of images does not exist.
    """
    output, images = Path(output), Path(images)
    if not images.is_dir():
        raise Missing(f"missing: {images}, which must be the folder of the questions' images")
    digest = digest or model_digest(model)
    options = {"max_new_tokens": max_new_tokens} | options
    made_with = json.loads(json.dumps(options, default=str))  # as it is read from a file again
    made_with["task_embedding"] = None if embedding is None else tensor_digest(embedding)
    rows = {row["question_id"]: row for row in read_answers(output) if not failed(row)}
    check_answers(output, list(rows.values()), questions, images, template, digest, made_with)
    if _averages_padding(model) and batch_size > 1:
        logger.warning("pool='all' averages over padding: questions are answered one by one")
        batch_size = 1
    output.parent.mkdir(parents=True, exist_ok=True)
    write_answers(output, list(rows.values()))  # without an incomplete line, and without those that failed
    left = [question for question in questions if question["unique_id"] not in rows]
    with output.open("a", encoding="utf-8") as stream:
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            for row in _answer_batch(model, processor, batch, images, template, embedding, options):
                row["metadata"] |= {DIGEST: digest, OPTIONS: made_with}
                row |= {"answer_id": uuid.uuid4().hex, "model_id": model_id}
                stream.write(json.dumps(row) + "\n")
                rows[row["question_id"]] = row
            stream.flush()
    ordered = [rows[question["unique_id"]] for question in questions]
    if ordered != list(rows.values()):  # questions that failed before were answered last
        write_answers(output, ordered)
    return ordered


def _answer_batch(model, processor, questions, folder, template, embedding, options) -> list[dict]:
    rows, pictures = [], {}
    for number, question in enumerate(questions):
        metadata = {"question": question["prompt"]}
        try:
            file = find_image(folder, question["image_path"])
            pictures[number] = load_image(file)
            metadata[IMAGE] = image_digest(file)
        except BadImage as error:
            logger.warning("%s is counted as wrong: %s", question["unique_id"], error)
            metadata[ERROR] = str(error)
        rows.append(
            {
                "question_id": question["unique_id"],
                "prompt": build_prompt(question["prompt"], template),
                "predict": "",
                "target": question["target"],
                "image_path": str(folder / question["image_path"]),
                "metadata": metadata,
            }
        )
    if pictures:
        prompts = [rows[number]["prompt"] for number in pictures]
        said = answer(model, processor, prompts, list(pictures.values()), embedding=embedding, **options)
        for number, text in zip(pictures, said):
            rows[number]["predict"] = text
    return rows


def _averages_padding(model: nn.Module) -> bool:
    configs = getattr(model, "peft_config", {}).values()
    return any(getattr(config, "pool", None) == "all" for config in configs)
