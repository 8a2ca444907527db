"""Which answers a run keeps: those that were made in the same way, and not those whose images failed."""

import json
import shutil

import pytest
import torch

from mixlora_llava.example import digits
from mixlora_llava.model import generate, small
from mixlora_llava.model.load import load_llava
from mixlora_llava.scoring import predict


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    digits.write(folder / "data", per_task=4, held_out=6, copies=1)
    small.save(*small.small_llava(digits.texts(), width=24, layers=2), folder / "base")
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_llava(folder / "base")


def test_answers_of_other_options_or_images_are_not_gone_on_with(folder, loaded, tmp_path):
    questions = predict.read_questions(folder / "data/eval/side.jsonl")
    images, out, embedding = tmp_path / "images", tmp_path / "side.jsonl", torch.ones(3)
    shutil.copytree(folder / "data/images", images)
    given = {"template": "bare", "max_new_tokens": 2}
    rows = predict.predict(*loaded, questions, images, out, **given)
    content = out.read_text()
    for other, message in [
        ({"max_new_tokens": 1}, r"other options \(max_new_tokens: 2, now 1\): give another output, or delete it"),
        ({"num_beams": 2}, r"other options \(num_beams: None, now 2\)"),
        ({"embedding": embedding}, r"other options \(task_embedding: None, now '[0-9a-f]{32}'\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            predict.predict(*loaded, questions, images, out, **given | other)
    assert predict.predict(*loaded, questions, images, out, **given, batch_size=3) == rows  # it changes no answer
    one, other = (images / question["image_path"] for question in questions[:2])
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="an answer about another image than"):
        predict.predict(*loaded, questions, images, out, **given)
    assert out.read_text() == content
    rows[0]["metadata"].pop("options")  # as an earlier version wrote it
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="do not say with which options"):
        predict.predict(*loaded, questions, images, out, **given)
    out.write_text('{"question_id": "x"}\n')
    with pytest.raises(ValueError, match="is no file of answers"):
        predict.predict(*loaded, questions, images, out, **given)


def test_questions_whose_images_failed_are_asked_again(folder, loaded, tmp_path, monkeypatch):
    """The first and the fourth image are missing at first. The other questions are not asked again."""
    questions = predict.read_questions(folder / "data/eval/side.jsonl")
    images, out, given = tmp_path / "images", tmp_path / "side.jsonl", {"template": "bare", "max_new_tokens": 2}
    whole = predict.predict(*loaded, questions, folder / "data/images", tmp_path / "whole.jsonl", **given)
    shutil.copytree(folder / "data/images", images)
    lost = [images / questions[number]["image_path"] for number in (0, 3)]
    for file in lost:
        file.unlink()
    before = predict.predict(*loaded, questions, images, out, **given)
    assert ["error" in row["metadata"] for row in before] == [True, False, False, True, False, False]
    for file in lost:
        shutil.copy(folder / "data/images" / file.relative_to(images), file)
    asked = []
    monkeypatch.setattr(predict, "answer", lambda *a, **k: asked.append(a[2]) or generate.answer(*a, **k))
    again = predict.predict(*loaded, questions, images, out, **given)
    assert [row["predict"] for row in again] == [row["predict"] for row in whole]
    assert [row["question_id"] for row in again] == [question["unique_id"] for question in questions]
    assert again == [json.loads(line) for line in out.read_text().splitlines()]
    assert not any("error" in row["metadata"] for row in again) and [len(prompts) for prompts in asked] == [2]
    assert [row for row in again if row in before] == [before[number] for number in (1, 2, 4, 5)]


def test_a_missing_folder_of_images_is_refused(folder, loaded, tmp_path):
    questions = predict.read_questions(folder / "data/eval/side.jsonl")
    with pytest.raises(FileNotFoundError, match=r"missing: .*nope, which must be the folder"):
        predict.predict(*loaded, questions, tmp_path / "nope", tmp_path / "side.jsonl", template="bare")
    assert not (tmp_path / "side.jsonl").exists()
