"""Measure the mechanism of a tuned model: which factors it chooses, whether choices still change, and interference."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mixlora_kernels.peft.side_information import find_side_information

from ..analysis import interference
from .pictures import draw
from .suites import Instruction, Question, batch, questions

if TYPE_CHECKING:
    from .talk import Talk
    from .tuning import Tuned

MOST_USED = 4  # the number of most used factors, whose part of the choices shows a collapse
PROBED = 160  # questions whose choices are compared during the training
SHOWN = 320  # questions whose choices are recorded for the maps
BATCHES, SIZE = 3, 16  # for each instruction, to measure interference


def some(rows: Sequence[Question], count: int) -> list[Question]:
    """About ``count`` of the questions, equally many of each instruction."""
    return list(rows[:: max(1, len(rows) // count)])


@torch.inference_mode()
def choices(
    tuned: "Tuned", talk: "Talk", instructions: list[Instruction], rows: list[Question]
) -> dict[str, np.ndarray]:
    """The factors chosen for prompts without answers, [2, N, r] for pools A and B, by the layer's name."""
    side = find_side_information(tuned.model)
    parts: dict[str, list] = {}
    order = []
    for members in talk.lengths([instructions[row.task].text for row in rows]).values():
        asked = [rows[number] for number in members]
        with tuned.told(asked):
            inputs = talk.asking([instructions[row.task].text for row in asked], draw([row.scene for row in asked]))
            tuned.model(**inputs, use_cache=False)
        order += members
        for (name, _), routing in side.last.items():
            parts.setdefault(name, []).append(torch.stack([routing.index_a, routing.index_b]))
    back = np.argsort(order)
    return {name: torch.cat(found, dim=1).numpy()[:, back] for name, found in parts.items()}


class Follow:
    """How often choices change while a model trains.

    Attributes:
        flips: a row for each measurement but the first: ``step``, and the part of all pairs, over questions and layers,
            that the same question did not have in the measurement before.
    """

    def __init__(self, tuned: "Tuned", talk: "Talk", instructions: list[Instruction], seed: int):
        self.arguments = (tuned, talk, instructions, some(questions(instructions, "choose", seed), PROBED))
        self.before: dict[str, np.ndarray] | None = None
        self.flips: list[dict] = []

    def look(self, step: int) -> None:
        state = torch.get_rng_state()  # random routing draws here too, which must not change the training
        now = choices(*self.arguments)
        torch.set_rng_state(state)
        if self.before is not None:
            self.flips.append({"step": step, "changed": changed(self.before, now)})
        self.before = now


def changed(before: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> float:
    """The part of pairs that the same question did not have before, in any slot."""
    shares = []
    for name, pairs in now.items():
        same = (pairs[:, :, :, None] == before[name][:, :, None, :]).all(0)  # [N, r now, r before]
        shares.append(1 - same.any(-1).mean())
    return float(np.mean(shares))


def usage(chosen: dict[str, np.ndarray], num_factors: int | None = None) -> dict[str, dict]:
    """How often each factor was chosen, and the part of the choices on the four most used factors, by layer and pool.
    At r = 4 that part is 1 if the same factors are always chosen, and 4 / E if all are chosen equally often."""
    found = {}
    for name, indices in chosen.items():
        for pool, index in zip("AB", indices):
            counts = np.bincount(index.ravel(), minlength=num_factors or int(indices.max()) + 1)
            found[f"{name}.{pool}"] = {"counts": counts.tolist(), "most_used": most_used(counts)}
    return found


def most_used(counts: Sequence[int], count: int = MOST_USED) -> float:
    """The part of all choices that fell on the ``count`` most used factors."""
    counts = np.sort(np.asarray(counts))[::-1]
    return float(counts[:count].sum() / counts.sum())


def detail(tuned: "Tuned", talk: "Talk", instructions: list[Instruction], seed: int) -> dict:
    """Interference between up to eight instructions (Equations 2 and 3). For MixLoRA also the single choices with their
    instructions, for maps."""
    seen = [task for task, instruction in enumerate(instructions) if instruction.seen]
    tasks = seen[:: max(1, len(seen) // 8)][:8]
    batches = {}
    for task in tasks:
        made = []
        for number in range(BATCHES):
            rows = batch(instructions, [task], SIZE, seed + 1000, number)
            asked, said = [instructions[task].text] * SIZE, [instructions[task].answer(row.scene) for row in rows]
            inputs = talk.training(asked, said, draw([row.scene for row in rows]))
            if tuned.table is not None:
                inputs["task_embedding"] = tuned.table[[task] * SIZE]
            made.append(inputs)
        batches[instructions[task].name] = made
    measured = interference.measure(tuned.model, batches)
    found: dict = {"interference": {name: measured[name] for name in ("tasks", "mean", "negative")}}
    if any("router" in name for name, _ in tuned.model.named_parameters()):
        rows = some(questions(instructions, "report", seed), SHOWN)
        last = {name: index for name, index in choices(tuned, talk, instructions, rows).items() if ".mlp." in name}
        found["choices"] = {
            "tasks": [instructions[row.task].name for row in rows],
            "unseen": sorted({i.name for i in instructions if not i.seen}),
            "chosen": {name: index.tolist() for name, index in last.items()},
        }
    return found
