"""What a tuned model shows of its mechanism: which factors it chooses, whether choices still change, interference."""

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

MOST_USED = 4  # the factors whose share of the choices tells a collapse
PROBED = 160  # questions whose choices are followed while it trains
SHOWN = 320  # questions whose choices are kept for the maps
BATCHES, SIZE = 3, 16  # of every instruction, for interference


def some(rows: Sequence[Question], count: int) -> list[Question]:
    """About ``count`` of the questions, from every instruction alike."""
    return list(rows[:: max(1, len(rows) // count)])


@torch.inference_mode()
def choices(
    tuned: "Tuned", talk: "Talk", instructions: list[Instruction], rows: list[Question]
) -> dict[str, np.ndarray]:
    """The factors that prompts route to, as they are before an answer: by layer's name, [2, N, r], pools A and B."""
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
        flips: a row for every look but the first: ``step``, and which share of the probed questions' pairs was not
            among that question's pairs at the look before, over all layers.
    """

    def __init__(self, tuned: "Tuned", talk: "Talk", instructions: list[Instruction], seed: int):
        self.arguments = (tuned, talk, instructions, some(questions(instructions, "choose", seed), PROBED))
        self.before: dict[str, np.ndarray] | None = None
        self.flips: list[dict] = []

    def look(self, step: int) -> None:
        state = torch.get_rng_state()  # random routing draws here too, and training must not notice
        now = choices(*self.arguments)
        torch.set_rng_state(state)
        if self.before is not None:
            self.flips.append({"step": step, "changed": changed(self.before, now)})
        self.before = now


def changed(before: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> float:
    """The share of pairs that were not among the same question's pairs before, whatever their slots."""
    shares = []
    for name, pairs in now.items():
        same = (pairs[:, :, :, None] == before[name][:, :, None, :]).all(0)  # [N, r now, r before]
        shares.append(1 - same.any(-1).mean())
    return float(np.mean(shares))


def usage(chosen: dict[str, np.ndarray], num_factors: int | None = None) -> dict[str, dict]:
    """By layer and pool how often each factor was chosen, and the share of the four most used: r of them chosen always
    is 1 at r = 4; all alike is 4 / E."""
    found = {}
    for name, indices in chosen.items():
        for pool, index in zip("AB", indices):
            counts = np.bincount(index.ravel(), minlength=num_factors or int(indices.max()) + 1)
            found[f"{name}.{pool}"] = {"counts": counts.tolist(), "most_used": most_used(counts)}
    return found


def most_used(counts: Sequence[int], count: int = MOST_USED) -> float:
    """The share of all choices that fell on the ``count`` factors chosen most."""
    counts = np.sort(np.asarray(counts))[::-1]
    return float(counts[:count].sum() / counts.sum())


def detail(tuned: "Tuned", talk: "Talk", instructions: list[Instruction], seed: int) -> dict:
    """Interference between up to eight instructions (Equations 2 and 3); and, for MixLoRA, single choices with their
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
