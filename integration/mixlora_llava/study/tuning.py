"""One run: train an adapter on a suite, ask it the questions of another split, and measure its routing."""

import math
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mixlora_kernels.peft import task_embedding

from ..model.patch import patch_llava
from . import costs, probes
from .base import Base
from .methods import METHODS, Method, fix_factors, task_table
from .pictures import draw
from .suites import SUITES, Instruction, Question, batch, questions
from .talk import Talk

BATCH, ASKED = 16, 200  # the instructions of a training step, and the questions that are answered at a time
WARM_UP, CLIP = 0.05, 1.0
CHECKPOINTS = 8  # measurements of the routing during the training
SEARCHED = 0  # the seed of the searches for learning rates, whose results are not reported


class Run(NamedTuple):
    """The settings of a run. Its accuracy depends on nothing else.

    Attributes:
        steps: the number of this method's steps, with its factor ``longer``.
        detail: whether to record interference and single choices.
    """

    suite: str
    method: str
    rate: float
    seed: int
    steps: int
    detail: bool = False

    @property
    def split(self) -> str:
        """The split of the questions. A search does not use the pictures of the report."""
        return "choose" if self.seed == SEARCHED else "report"

    @property
    def name(self) -> str:
        """The name of the result's file."""
        return f"{self.suite}-{self.method}-{self.rate:.4g}-seed{self.seed}-steps{self.steps}"


class Tuned(NamedTuple):
    """A model with an adapter for some of a suite's instructions.

    Attributes:
        table: the task embedding of each instruction, [T, d]; None if the method has none.
        tasks: the suite's instructions that this adapter answers.
    """

    model: nn.Module
    table: Tensor | None
    tasks: list[int]

    def told(self, asked: list[Question]):
        """A context that gives the layers the task embeddings of a batch."""
        if self.table is None:
            return nullcontext()
        return task_embedding(self.model, self.table[[question.task for question in asked]])


def run(spec: Run, base: Base, count: int | None = None) -> dict:
    """Do a run.

    Args:
        count: the number of questions; by default the split's.

    Returns:
        ``accuracy``, in percent, on the trained instructions and on the "unseen" ones (None without any), and
        ``tasks``, by instruction; ``loss`` and costs; for MixLoRA also the results of ``probes``.
    """
    method, instructions = METHODS[spec.method], SUITES[spec.suite](spec.seed)
    seen = [task for task, instruction in enumerate(instructions) if instruction.seen]
    everything = list(range(len(instructions)))
    found: dict = {}
    if method.specialists:
        parts = [([task], [task], spec.steps // len(seen)) for task in seen]
    else:
        parts = [(seen, everything, spec.steps)]
    answered: list[tuple[Question, bool]] = []
    rows = questions(instructions, spec.split, spec.seed, count)
    for trained, asked, steps in parts:
        model, talk = base.load()
        tuned, notes = tune(model, talk, method, instructions, spec, trained, asked, steps)
        found = found or notes
        answered += ask(tuned, talk, instructions, [row for row in rows if row.task in asked])
        if method.kind == "mixlora" and spec.split == "report":
            found["usage"] = probes.usage(probes.choices(tuned, talk, instructions, probes.some(rows, 400)))
        if spec.detail and method.kind != "untuned" and not method.specialists:
            found |= probes.detail(tuned, talk, instructions, spec.seed)
    accuracy = {
        spec.split: percent([right for question, right in answered if instructions[question.task].seen]),
        "unseen": percent([right for question, right in answered if not instructions[question.task].seen]),
    }
    return {"accuracy": accuracy, "tasks": by_task(answered, instructions), **found}


def tune(
    model: nn.Module, talk: Talk, method: Method, instructions: list[Instruction], spec: Run, trained: list[int],
    asked: list[int], steps: int,
) -> tuple[Tuned, dict]:  # fmt: skip
    """Train an adapter. Return the model with it, its loss and its costs.

    Args:
        model: the base, which is changed in place.
        trained: the instructions of the training batches.
        asked: the instructions that the adapter answers.
    """
    if method.kind == "untuned":
        return Tuned(model, None, asked), {}
    tuned, parameters = adapt(model, talk, method, instructions, spec.seed, asked)

    def loss_of(step: int) -> Tensor:
        return batch_loss(tuned, talk, instructions, batch(instructions, trained, BATCH, spec.seed, step))

    followed = method.kind == "mixlora" and spec.split == "report"
    follow = probes.Follow(tuned, talk, instructions, spec.seed) if followed else None
    look = max(1, steps // CHECKPOINTS)

    def after(step: int) -> None:
        if follow is not None and (step + 1) % look == 0:
            follow.look(step + 1)

    notes = train(tuned.model, parameters, loss_of, spec.rate, steps, after)
    notes |= {"parameters": sum(p.numel() for p in parameters), "adapter_bytes": saved_bytes(tuned.model)}
    return tuned, notes if follow is None else notes | {"flips": follow.flips}


def adapt(
    model: nn.Module, talk: Talk, method: Method, instructions: list[Instruction], seed: int, asked: list[int]
) -> tuple[Tuned, list[nn.Parameter]]:
    """Add a method's adapter to the base. Also return the trained parameters."""
    table = task_table(method, model, talk, [instruction.text for instruction in instructions])
    torch.manual_seed(seed)  # for the adapter's initial values, and for random routing
    config = method.config(task_dim=0 if table is None else table.shape[1])
    tuned = Tuned(patch_llava(model, config).model, table, asked)
    if method.fixed:
        fix_factors(tuned.model, len(instructions), seed)
    return tuned, [parameter for parameter in tuned.model.parameters() if parameter.requires_grad]


def batch_loss(tuned: Tuned, talk: Talk, instructions: list[Instruction], rows: list[Question]) -> Tensor:
    """Compute the loss on the answers of a training batch."""
    inputs = talk.training(
        [instructions[row.task].text for row in rows], [instructions[row.task].answer(row.scene) for row in rows],
        draw([row.scene for row in rows]),
    )  # fmt: skip
    with tuned.told(rows):
        return tuned.model(**inputs).loss


def train(
    model: nn.Module, parameters: list[nn.Parameter], loss_of: Callable[[int], Tensor], rate: float, steps: int,
    after: Callable[[int], None],
) -> dict:  # fmt: skip
    """Train with AdamW without weight decay, and with gradients clipped at 1. The learning rate rises over the first
    twentieth of the steps, and then falls along a cosine.

    Returns:
        ``loss``, means over tenths of the training; ``step_ms``, the median processor time of a step in ms, with the
        making of its batch; ``peak_bytes``, the peak memory of a forward and backward beyond model and adapter.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    warm = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, s - warm) / (steps - warm)))
    )
    losses, seconds = [], []
    for step in range(steps):
        model.train()
        start = time.process_time()
        loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.process_time() - start)
        losses.append(loss.item())
        model.eval()
        after(step)
    if not math.isfinite(losses[-1]):
        raise FloatingPointError(f"the loss is {losses[-1]} after {steps} steps at a rate of {rate}")
    model.train()
    peak = costs.peak_bytes(lambda: loss_of(0).backward())
    optimizer.zero_grad()
    model.eval()
    tenth = max(1, steps // 10)
    parts = [losses[start : start + tenth] for start in range(0, steps, tenth)]
    return {"loss": [sum(part) / len(part) for part in parts], "step_ms": costs.median_ms(seconds), "peak_bytes": peak}


def saved_bytes(model: nn.Module) -> int:
    """The size of the adapter's saved weights, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(Path(folder, "adapter_model.safetensors"))
    return sum(tensor.numel() * tensor.element_size() for tensor in weights.values())


def ask(tuned: Tuned, talk: Talk, instructions: list[Instruction], rows: list[Question]) -> list[tuple[Question, bool]]:
    """Generate an answer to each question greedily, and tell whether it is exactly the expected one."""
    found: list = [None] * len(rows)
    for members in talk.lengths([instructions[row.task].text for row in rows]).values():
        for start in range(0, len(members), ASKED):
            some = members[start : start + ASKED]
            asked = [rows[number] for number in some]
            with tuned.told(asked):
                said = talk.answers(
                    tuned.model, [instructions[row.task].text for row in asked], draw([row.scene for row in asked])
                )
            for number, row, text in zip(some, asked, said):
                found[number] = (row, text == instructions[row.task].answer(row.scene))
    return found


def by_task(rows: list[tuple[Question, bool]], instructions: list[Instruction]) -> dict[str, float]:
    return {
        instruction.name: percent([right for question, right in rows if question.task == task])
        for task, instruction in enumerate(instructions)
    }


def percent(right: list[bool]) -> float | None:
    return 100 * sum(right) / len(right) if right else None
