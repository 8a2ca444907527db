"""Answer files of questions, in the released format.

Questions are JSONL files, one for each task, with ``unique_id, image_path, prompt, target``. A stopped run resumes
where it stopped. Each answer records the model and the adapter that gave it. A run does not resume with answers of
another model.
"""

import json
import logging
import uuid
from pathlib import Path

from torch import Tensor, nn

from ..data.images import BadImage, find_image, load_image
from ..model.digest import model_digest
from ..model.generate import answer, build_prompt
from ..refusal import Refusal

logger = logging.getLogger(__name__)
FIELDS = ("unique_id", "image_path", "prompt", "target")
DIGEST = "model_digest"  # the field of an answer's metadata with the digest of model and adapter


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
        ValueError: a line is not JSON, lacks a field, or has a field that is not text; or an id occurs twice.
    """
    questions, ids = [], set()
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        try:
            question = json.loads(line)
        except json.JSONDecodeError as error:
            raise Refusal(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(question, dict) or (missing := [name for name in FIELDS if name not in question]):
            raise Refusal(f"{file}, line {number}: lacks {missing if isinstance(question, dict) else FIELDS}")
        if wrong := [name for name in FIELDS[1:] if not isinstance(question[name], str)]:
            raise Refusal(f"{file}, line {number}: {wrong} must be texts")
        if question["unique_id"] in ids:
            raise Refusal(f"{file}, line {number}: the id {question['unique_id']!r} occurs twice")
        ids.add(question["unique_id"])
        questions.append(question)
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
    **options,
) -> list[dict]:
    """Answer questions, and write each batch's answers as lines of ``output``.

    If an image cannot be used, the answer is empty, which counts as wrong, and ``metadata`` gives the reason.

    Args:
        images: the folder that ``image_path`` is relative to.
        output: a JSONL file. Answers that it already contains are kept.
        batch_size: the number of questions in a batch. It is 1 for adapters that average over padding, whose answers
            depend on padding.
        embedding: the task's embedding, for ``routing="task"``.
        digest: the model's ``model_digest``, if it is known. It is written to each answer's ``metadata``.
        options: see ``generate.answer``.

    Returns:
        All rows: ``question_id, prompt, predict, target, image_path, answer_id, model_id, metadata``.

    Raises:
        ValueError: the file has answers to other questions, or of another model or adapter.
    """
    output = Path(output)
    rows = _finished(output)
    digest = digest or model_digest(model)
    _check_answers(output, rows, questions, template, digest)
    if _averages_padding(model) and batch_size > 1:
        logger.warning("pool='all' averages over padding: questions are answered one by one")
        batch_size = 1
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as stream:
        for start in range(len(rows), len(questions), batch_size):
            new = _answer_batch(
                model, processor, questions[start : start + batch_size], Path(images), template, embedding, options
            )
            for row in new:
                row["metadata"][DIGEST] = digest
                row |= {"answer_id": uuid.uuid4().hex, "model_id": model_id}
                stream.write(json.dumps(row) + "\n")
            stream.flush()
            rows += new
    return rows


def _check_answers(output: Path, rows: list[dict], questions: list[dict], template: str, digest: str) -> None:
    """Refuse to resume with answers of another model or adapter, or to other questions."""
    asked = [(q["unique_id"], build_prompt(q["prompt"], template), q["target"]) for q in questions[: len(rows)]]
    if [(row["question_id"], row["prompt"], row["target"]) for row in rows] != asked:
        raise Refusal(f"{output} holds answers to other questions: give another output, or delete it")
    if others := {row["metadata"].get(DIGEST) for row in rows} - {digest}:
        names = ", ".join(sorted({row["model_id"] for row in rows} - {""})) or "unnamed"
        whose = "an unknown model" if others == {None} else f"another model or adapter ({names}; digest {others.pop()})"
        raise Refusal(
            f"{output} holds answers of {whose}, and the digest of this one is {digest}: give another output, or "
            "delete it"
        )


def _answer_batch(model, processor, questions, folder, template, embedding, options) -> list[dict]:
    rows, pictures = [], {}
    for number, question in enumerate(questions):
        metadata = {"question": question["prompt"]}
        try:
            pictures[number] = load_image(find_image(folder, question["image_path"]))
        except BadImage as error:
            logger.warning("%s is counted as wrong: %s", question["unique_id"], error)
            metadata["error"] = str(error)
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


def _finished(output: Path) -> list[dict]:
    """Read the complete lines of a file, and cut off an incomplete last line of a stopped run."""
    if not output.is_file():
        return []
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with output.open("r+b") as stream:
            stream.truncate(len(whole))
    return [json.loads(line) for line in whole.decode("utf-8").splitlines()]


def _averages_padding(model: nn.Module) -> bool:
    configs = getattr(model, "peft_config", {}).values()
    return any(getattr(config, "pool", None) == "all" for config in configs)
