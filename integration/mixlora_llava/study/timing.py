"""Measure the time of a training step while nothing else runs. The methods alternate, so that a slow moment affects all
alike."""

import json
import random
import time
from pathlib import Path
from statistics import median

import torch

from . import plan
from .base import Base
from .methods import METHODS
from .records import made, rounded
from .suites import SUITES, batch
from .tuning import BATCH, CLIP, adapt, batch_loss

SUITE, REFERENCE = "conflict8", "lora_r4"
FILE = "times.json"
FIRST = 3  # rounds that are not counted, because first runs allocate and compile
METHODS_TIMED = [name for name in plan.HEADLINE if METHODS[name].kind != "untuned"]


def measure(base: Base, methods: list[str] = METHODS_TIMED, rounds: int = 25) -> dict:
    """Time steps in one thread.

    Returns:
        For each method ``step_ms``, the median over rounds; and ``ratio``, the median over rounds of its time divided
        by the reference method's time in the same round.
    """
    steps = {name: stepper(base, name) for name in methods}
    times: dict[str, list[float]] = {name: [] for name in methods}
    order, threads = random.Random(0), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(-FIRST, rounds):
            for name in order.sample(methods, len(methods)):
                start = time.perf_counter()
                steps[name](number + FIRST)
                if number >= 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    return {
        name: {"step_ms": median(found), "ratio": median(a / b for a, b in zip(found, times[REFERENCE]))}
        for name, found in times.items()
    }


def stepper(base: Base, name: str):
    """Return a function that does the training step of a given number with a method."""
    model, talk = base.load()
    instructions = SUITES[SUITE](1)
    tuned, parameters = adapt(model, talk, METHODS[name], instructions, 1, list(range(len(instructions))))
    tuned.model.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)

    def step(number: int) -> None:
        rows = batch(instructions, tuned.tasks, BATCH, 1, number)
        batch_loss(tuned, talk, instructions, rows).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def write(folder: Path, base: Base) -> Path:
    """Measure, and write the result beside the raw results."""
    file = folder / FILE
    file.write_text(json.dumps(rounded({"times": measure(base), "made": made()}), indent=1) + "\n", encoding="utf-8")
    return file


def read(folder: Path) -> dict[str, dict]:
    """Read the measurements by method; empty if there are none."""
    file = folder / FILE
    return json.loads(file.read_text(encoding="utf-8"))["times"] if file.is_file() else {}
