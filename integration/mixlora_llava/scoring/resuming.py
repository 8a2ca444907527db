"""Check that the answers in a file were made as a run would make them, so that the run can resume with them.

Each answer records what it was made with: the model and the adapter, the options of the generation, and the image.
"""

import hashlib
from pathlib import Path

from ..data.images import find_image
from ..model.generate import build_prompt
from ..refusal import Refusal

DIGEST = "model_digest"  # the fields of an answer's metadata: the digest of model and adapter,
OPTIONS = "options"  # what else the generation was given,
IMAGE = "image_digest"  # and the digest of the image's file


def image_digest(file: Path) -> str:
    """32 hexadecimal digits of the file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


def check_answers(
    output: Path, rows: list[dict], questions: list[dict], images: Path, template: str, digest: str, options: dict
) -> None:
    """Check that answers were made from these questions and images, with this model and these options.

    Raises:
        ValueError: they were not. The message says what is different.
    """
    do = "give another output, or delete it"
    asked = {q["unique_id"]: q for q in questions}
    for row in rows:
        question = asked.get(row["question_id"])
        if question is None or (row["prompt"], row["target"]) != (
            build_prompt(question["prompt"], template), question["target"],
        ):  # fmt: skip
            raise Refusal(f"{output} holds answers to other questions: {do}")
    if others := {row["metadata"].get(DIGEST) for row in rows} - {digest}:
        names = ", ".join(sorted({row["model_id"] for row in rows} - {""})) or "unnamed"
        whose = "an unknown model" if others == {None} else f"another model or adapter ({names}; digest {others.pop()})"
        raise Refusal(f"{output} holds answers of {whose}, and the digest of this one is {digest}: {do}")
    for row in rows:
        before = row["metadata"].get(OPTIONS)
        if before is None:
            raise Refusal(f"{output} holds answers that do not say with which options they were generated: {do}")
        if changed := [name for name in {**before, **options} if before.get(name) != options.get(name)]:
            said = "; ".join(f"{name}: {before.get(name)!r}, now {options.get(name)!r}" for name in changed)
            raise Refusal(f"{output} holds answers of other options ({said}): {do}")
        image = find_image(images, asked[row["question_id"]]["image_path"])
        if image_digest(image) != row["metadata"].get(IMAGE):
            raise Refusal(f"{output} holds an answer about another image than {image}: {do}")
