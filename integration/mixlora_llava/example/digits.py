"""A multi-task visual instruction set from scikit-learn's handwritten digits, in Vision-Flan's format.

Each image shows a real digit, eight by eight pixels with seventeen grey levels, in one of four inks, in one quarter of
a dark field. The training split has the first 1,400 digits of the data set, the test split has the rest. The
two parts were written by different people, or at least separately.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {"red": (255, 60, 60), "green": (60, 255, 60), "blue": (90, 90, 255), "white": (255, 255, 255)}
SIDES = ("left", "right")
SPLIT = 1400


class Picture(NamedTuple):
    """The contents of an image."""

    digit: int
    ink: str
    side: str
    row: int = 0  # 0 above, 1 below; no question asks for it


class Task(NamedTuple):
    """A question, the property that it asks for, and the task's definition for task routing."""

    question: str
    answer: Callable[[Picture], str]
    definition: str


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# The questions list their options, as in Vision-Flan.
TASKS = {
    "digit_name": Task(
        "Which digit is written? Answer with its name.",
        lambda p: NAMES[p.digit],
        "Name the digit that is written in the image.",
    ),
    "digit_parity": Task(
        "Is the digit odd or even?",
        lambda p: "odd" if p.digit % 2 else "even",
        "Say whether the digit in the image is odd or even.",
    ),
    "digit_successor": Task(
        "Which digit comes after the one that is written?",
        lambda p: NAMES[(p.digit + 1) % 10],
        "Name the digit that follows the one in the image; zero follows nine.",
    ),
    "ink_colour": Task(
        "What is the colour of the ink: red, green, blue or white?",
        lambda p: p.ink,
        "Name the colour of the ink in the image.",
    ),
    "side": Task(
        "Is the digit on the left or on the right?",
        lambda p: p.side,
        "Say on which side of the image the digit is.",
    ),
    "greater_than_four": Task(
        "Is the digit greater than four?",
        lambda p: _yes(p.digit > 4),
        "Decide whether the digit in the image is greater than four.",
    ),
}
CAPTION = Task(
    "Describe the image.",
    lambda p: f"a {p.ink} {NAMES[p.digit]} on the {p.side}",
    "Describe the image: ink, digit and side.",
)
PRESENCE = "Is there a {name} in the image?"  # a question as in POPE; the answer is yes for half of them


def draw(pixels: np.ndarray, picture: Picture) -> Image.Image:
    """Draw a digit's pixels [8, 8], from 0 to 16, as an image of 16 by 16 pixels."""
    field = np.full((16, 16, 3), 16, np.float32)
    quarter = field[8 * picture.row :][:8, 8 * SIDES.index(picture.side) :][:, :8]
    quarter += (pixels / 16)[..., None] * (np.array(INKS[picture.ink], np.float32) - 16)
    return Image.fromarray(field.round().astype(np.uint8))


def texts() -> list[str]:
    """All questions and answers, for a tokenizer."""
    said = [*NAMES, *INKS, *SIDES, "odd even yes no a on the . USER: ASSISTANT:"]
    asked = [task.question for task in [*TASKS.values(), CAPTION]] + [task.definition for task in TASKS.values()]
    return [*said, *asked, PRESENCE.format(name="zero"), CAPTION.definition]


def questions_in_words() -> list[tuple[str, str]]:
    """All questions about all possible pictures, described in words, with their answers."""
    pictures = [Picture(digit, ink, side) for digit in range(10) for ink in INKS for side in SIDES]
    found = []
    for picture in pictures:
        told = CAPTION.answer(picture)
        found += [(f"{told} . {task.question}", task.answer(picture)) for task in TASKS.values()]
        for digit in (picture.digit, (picture.digit + 3) % 10):
            found.append((f"{told} . {PRESENCE.format(name=NAMES[digit])}", _yes(digit == picture.digit)))
    return found


def write_images(folder: Path, seed: int, copies: int) -> dict[str, list[tuple[str, Picture]]]:
    """Draw each digit ``copies`` times, with a random ink and place. Return the file names by split."""
    digits, random_source = load_digits(), random.Random(seed)
    splits: dict[str, list[tuple[str, Picture]]] = {"train": [], "test": []}
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target)):
        split = "train" if number < SPLIT else "test"
        for copy in range(copies):
            ink, side, row = (random_source.choice(kinds) for kinds in (list(INKS), SIDES, (0, 1)))
            picture = Picture(int(digit), ink, side, row)
            name = f"{split}/{number:04}_{copy}.png"
            (folder / split).mkdir(parents=True, exist_ok=True)
            draw(pixels, picture).save(folder / name)
            splits[split].append((name, picture))
    return splits


def record(name: str, image: str, task: str, question: str, answer: str) -> dict:
    """A record in Vision-Flan's format."""
    talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "task_name": task, "conversations": talk}


def write(folder: str | Path, *, seed: int = 0, per_task: int = 1000, held_out: int = 100, copies: int = 2) -> None:
    """Write the data set.

    It consists of ``images/``; ``pretraining.json``, with a caption for each image of the training split, and with the
    tasks' questions about captions, without images, so that the model can read before it is tuned; ``train.json``, with
    ``per_task`` records of each task; ``eval/TASK.jsonl``, with ``held_out`` questions of each task about images of the
    test split; ``eval/pope_pop.jsonl``; and ``definitions.json``.
    """
    folder, random_source = Path(folder), random.Random(seed)
    splits = write_images(folder / "images", seed, copies)
    captions = [
        record(f"caption-{number}", image, "caption", CAPTION.question, CAPTION.answer(picture))
        for number, (image, picture) in enumerate(splits["train"])
    ]
    pretraining = captions + [
        {"id": f"text-{number}", "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": said}]}
        for number, (ask, said) in enumerate(questions_in_words())
    ]
    train = [
        record(f"{task}-{number}", image, task, TASKS[task].question, TASKS[task].answer(picture))
        for task in TASKS
        for number, (image, picture) in enumerate(random_source.sample(splits["train"], per_task))
    ]
    random_source.shuffle(train)
    for name, records in {"pretraining": pretraining, "train": train}.items():
        (folder / f"{name}.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    definitions = {name: task.definition for name, task in TASKS.items()}
    (folder / "definitions.json").write_text(json.dumps(definitions, indent=1), encoding="utf-8")
    (folder / "eval").mkdir(exist_ok=True)
    for task in TASKS:
        chosen = random_source.sample(splits["test"], held_out)
        rows = [(image, TASKS[task].question, TASKS[task].answer(picture)) for image, picture in chosen]
        write_questions(folder / "eval" / f"{task}.jsonl", task, rows)
    rows = []
    for image, picture in random_source.sample(splits["test"], held_out):
        other = random_source.choice([digit for digit in range(10) if digit != picture.digit])
        for digit in (picture.digit, other):
            rows.append((image, PRESENCE.format(name=NAMES[digit]), _yes(digit == picture.digit)))
    write_questions(folder / "eval" / "pope_pop.jsonl", "pope_pop", rows)


def write_questions(file: Path, task: str, rows: list[tuple[str, str, str]]) -> None:
    """Questions in the released evaluation's format."""
    lines = [
        json.dumps({"unique_id": f"{task}-{number}", "image_path": image, "prompt": prompt, "target": target})
        for number, (image, prompt, target) in enumerate(rows)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
