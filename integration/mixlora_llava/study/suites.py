"""Suites of instructions about the pictures, with their answers.

``conflict8``, ``conflict32``: instructions about the same picture that differ in one word, each with its own mapping.
``many``: fifty instructions about arithmetic and recognition. A fifth of them are not in the training.
``related``: six instructions whose answers help one another.

A seed determines the mapping of each code word, and which instructions are not in the training.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .pictures import INKS, NAMES, SIDES, Scene, scenes, split

CODES = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel",
    "india", "juliet", "kilo", "lima", "mike", "november", "oscar", "papa",
    "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whisky", "xray",
    "yankee", "zulu", "amber", "birch", "cedar", "dogwood", "elm", "fir",
)  # fmt: skip
QUESTIONS = {"choose": 400, "report": 800}  # the number of questions of a suite, equally many of each instruction


class Instruction(NamedTuple):
    """A question, and a function that gives the answer for a scene. ``seen`` is False if it is not in the training."""

    name: str
    text: str
    answer: Callable[[Scene], str]
    seen: bool = True


class Question(NamedTuple):
    """One instruction about one scene."""

    task: int
    scene: Scene


def name_of(number: int) -> str:
    """The name of the last digit of a number."""
    return NAMES[number % 10]


def conflict(count: int, seed: int) -> list[Instruction]:
    """Instructions with code words that each permute the digits. Every second one also answers with a permuted ink."""
    source, found = np.random.default_rng([seed, count]), []
    inks = list(INKS)
    for number, code in enumerate(CODES[:count]):
        digit, ink = source.permutation(10), source.permutation(len(inks))

        def answer(scene: Scene, digit=digit, ink=ink, both=number % 2 == 1) -> str:
            said = NAMES[digit[scene.digit]]
            return f"{said} {inks[ink[inks.index(scene.ink)]]}" if both else said

        found.append(Instruction(code, f"code {code} ?", answer))
    return found


def many(seed: int) -> list[Instruction]:
    """Six families of eight instructions, and two instructions of recognition."""
    families: dict[str, tuple[str, Callable[[Scene, int], str]]] = {
        "plus": ("the digit plus {} ?", lambda s, n: name_of(s.digit + n)),
        "minus": ("the digit minus {} ?", lambda s, n: name_of(s.digit - n)),
        "from": ("{} minus the digit ?", lambda s, n: name_of(n - s.digit)),
        "greater": ("is the digit greater than {} ?", lambda s, n: "yes" if s.digit > n else "no"),
        "larger": ("the larger of the digit and {} ?", lambda s, n: NAMES[max(s.digit, n)]),
        "plus_ink": ("the digit plus {} and the ink ?", lambda s, n: f"{name_of(s.digit + n)} {s.ink}"),
    }
    found = [
        Instruction(
            f"{name}_{number}", text.format(NAMES[number]), lambda s, rule=rule, n=number: rule(s, n),
            seen=(number + place + seed) % 5 != 0,
        )
        for place, (name, (text, rule)) in enumerate(families.items())
        for number in range(1, 9)
    ]  # fmt: skip
    sight = [
        Instruction("ink", "which ink ?", lambda s: s.ink),
        Instruction("place", "where is the digit ?", lambda s: f"{s.row} {s.side}"),
    ]
    return [*found, *sight]


def related(_seed: int) -> list[Instruction]:
    """Six instructions that all need the same recognition."""
    return [
        Instruction("digit", "which digit ?", lambda s: NAMES[s.digit]),
        Instruction("next", "which digit is next ?", lambda s: name_of(s.digit + 1)),
        Instruction("parity", "odd or even ?", lambda s: "odd" if s.digit % 2 else "even"),
        Instruction("greater", "is the digit greater than four ?", lambda s: "yes" if s.digit > 4 else "no"),
        Instruction("ink_digit", "which ink and digit ?", lambda s: f"{s.ink} {NAMES[s.digit]}"),
        Instruction("side", "left or right ?", lambda s: s.side),
    ]


SUITES: dict[str, Callable[[int], list[Instruction]]] = {
    "conflict8": lambda seed: conflict(8, seed),
    "conflict32": lambda seed: conflict(32, seed),
    "many": many,
    "related": related,
}


def words() -> list[str]:
    """All words of the questions and answers of all suites, for a tokenizer."""
    texts = [*NAMES, *INKS, *SIDES, *CODES, "above below odd even yes no code USER: ASSISTANT:"]
    return texts + [instruction.text for build in SUITES.values() for instruction in build(0)]


def questions(instructions: list[Instruction], part: str, seed: int, count: int | None = None) -> list[Question]:
    """The questions of a split, equally many of each instruction. No picture occurs twice for one instruction.

    Args:
        part: "choose" or "report".
        count: the number of questions in all; by default ``QUESTIONS``.
    """
    source = np.random.default_rng([seed, len(part)])
    each = max(1, (count or QUESTIONS[part]) // len(instructions))
    return [
        Question(task, scene)
        for task in range(len(instructions))
        for scene in scenes(source.choice(split(part), each, replace=False), source)
    ]


def batch(instructions: list[Instruction], tasks: list[int], size: int, seed: int, step: int) -> list[Question]:
    """The training batch of a step. It depends on suite, seed and step alone, so that all methods have the same
    batches.

    Args:
        tasks: the tasks to draw from.
    """
    source = np.random.default_rng([seed, step, len(instructions)])
    shown = scenes(source.choice(split("train"), size), source)
    return [Question(int(task), scene) for task, scene in zip(source.choice(tasks, size), shown)]
