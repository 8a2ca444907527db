"""The plan: the runs and their order, the most important first.

The search for the learning rate is the same for each method and suite. It tries three rates with seed 0, each twice the
one before. While the best rate is the lowest or the highest one, it tries the next rate beyond it, at most twice on
each side. The rate with the highest accuracy on the split "choose" is used; of two equal ones, the lower rate. Other
seeds on other pictures are reported.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .methods import METHODS
from .tuning import SEARCHED, Run

STEPS = {"conflict8": 400, "many": 400, "related": 200, "conflict32": 800}
BEYOND = 2  # the most rates that a search tries beyond the first three, on each side
EARLIER = (
    "untuned", "lora_r4", "lora_r16", "lora_r24", "paper", "normalized", "tied", "tied_normalized",
    "tied_normalized_prompt",
)  # fmt: skip
LATER = ("lora_r16_scaling8", "lora_r24_scaling8", "tied_text_balanced")  # added while the study ran
HEADLINE = (*EARLIER, *LATER)
LONGER = (
    "lora_r24_scaling8_longer", "tied_text_balanced_longer", "lora_r4_longer", "lora_r16_longer", "paper_longer",
    "tied_normalized_longer",
)  # fmt: skip


class Wave(NamedTuple):
    """Runs of equal importance: each method on each suite with each of the seeds, after a search for its rate."""

    suites: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]


FIRST, SECOND = (1, 2, 3), (4, 5, 6)  # seeds of the first base and of the second one: see results/plan.md
FRESH, MORE = (11, 12, 13, 14, 15), (16, 17, 18, 19, 20)  # of the second base, to confirm
FULL = (
    Wave(("conflict8",), ("untuned", "lora_r4", "lora_r16", "lora_r24", "paper", "tied_normalized"), FIRST),
    Wave(("many",), ("untuned", "lora_r4", "lora_r24", "paper", "tied_normalized"), FIRST),
    Wave(("conflict8",), ("tied_normalized_prompt", "normalized", "tied"), FIRST),
    Wave(("many",), ("lora_r16", "tied_normalized_prompt", "normalized", "tied"), FIRST),
    Wave(("conflict8",), ("fixed", "lora_r62", "random"), FIRST),
    Wave(("related",), EARLIER, FIRST),
    Wave(("conflict8", "many"), EARLIER, SECOND),
    Wave(("conflict8",), ("lora_r4", "tied_normalized"), FRESH),
    Wave(("conflict8", "many"), ("lora_r4_scaling8", "lora_r16_scaling8", "lora_r24_scaling8"), SECOND),
    Wave(("conflict8", "many", "related"), ("tied_text_balanced", "tied_text", "tied_balanced"), SECOND),
    Wave(("conflict8", "many"), LATER, FRESH),
    Wave(("conflict8", "many"), LATER, MORE),
    Wave(("related",), (*EARLIER, *LATER), SECOND),
    Wave(("conflict8",), LONGER[:2], SECOND),
    Wave(("conflict32",), (*LATER, "untuned", "lora_r4", "paper"), SECOND),
    Wave(("conflict8",), ("paper_scaling2", "unconditional", "released", "task"), SECOND),
    Wave(("conflict8",), ("fixed", "lora_r62", "random"), SECOND),
    Wave(("conflict8",), LONGER[2:], SECOND),
    Wave(("many",), ("fixed", "lora_r62", "random", "unconditional"), SECOND),
    Wave(("conflict8",), ("specialists_r4", "paper_prompt", "lora_r2", "lora_r8", "lora_r32"), SECOND),
    Wave(("conflict8",), ("paper_e16_r2", "paper_e32_r2", "paper_e32_r4", "paper_e16_r8", "paper_e32_r8"), SECOND),
    Wave(("many",), ("paper_scaling2", "released", "task", "paper_prompt"), SECOND),
    Wave(("conflict32",), EARLIER, SECOND),
    Wave(("many",), ("lora_r2", "lora_r8", "lora_r32", "paper_e16_r2", "paper_e32_r2", "paper_e32_r4"), SECOND),
    Wave(("many",), ("paper_e16_r8", "paper_e32_r8", *LONGER), SECOND),
    Wave(("related",), ("specialists_r4", "fixed"), SECOND),
    Wave(("related", "conflict32"), HEADLINE, (7, 8)),
    Wave(("many",), ("specialists_r4",), SECOND),
)
QUICK = (Wave(("conflict8",), ("untuned", "lora_r4", "paper", "tied_text_balanced"), (1,)),)
QUICK_STEPS = {"conflict8": 150}

Found = Mapping[Run, float]  # the accuracy of finished runs on the split "choose"


def steps(suite: str, method: str, given: Mapping[str, int] = STEPS) -> int:
    return given[suite] * METHODS[method].longer


def search(suite: str, method: str, found: Found, given: Mapping[str, int] = STEPS) -> tuple[list[Run], float | None]:
    """The runs of a search that are known so far, and its resulting rate, or None if runs are missing."""
    first = METHODS[method].rate

    def at(place: int) -> Run:
        return Run(suite, method, first * 2.0**place, SEARCHED, steps(suite, method, given))

    if METHODS[method].kind == "untuned":
        return [], first
    low, high = -1, 1
    while True:
        places = range(low, high + 1)
        runs = [at(place) for place in places]
        if any(run not in found for run in runs):
            return runs, None
        best = max(places, key=lambda place: (found[at(place)], -place))
        if best == low > -1 - BEYOND:
            low -= 1
        elif best == high < 1 + BEYOND:
            high += 1
        else:
            return runs, at(best).rate


def chosen(suite: str, method: str, found: Found, given: Mapping[str, int] = STEPS) -> float | None:
    """The learning rate of a method on a suite; None if its search is not finished."""
    return search(suite, method, found, given)[1]


def begun(found: Found, given: Mapping[str, int] = STEPS) -> list[Run]:
    """The runs of searches that are not finished."""
    places = {(run.suite, run.method) for run in found}
    open_places = {place for place in places if place[0] in given and chosen(*place, found, given) is None}
    return [run for run in found if (run.suite, run.method) in open_places]


def ordered(found: Found, waves: tuple[Wave, ...] = FULL, given: Mapping[str, int] = STEPS) -> Iterator[Run]:
    """All runs that are known so far, finished or not, the most important first. Some are listed twice.

    A run is known when its learning rate has been chosen. The first seed of a method and suite is recorded in detail.
    """
    detailed: set[tuple[str, str]] = set()
    for wave in waves:
        for suite in wave.suites:
            for method in wave.methods:
                runs, rate = search(suite, method, found, given)
                yield from runs
                if rate is not None:
                    for seed in wave.seeds:
                        detail = (suite, method) not in detailed
                        detailed.add((suite, method))
                        yield Run(suite, method, rate, seed, steps(suite, method, given), detail)


def least(waves: tuple[Wave, ...] = FULL) -> dict[Wave, int]:
    """The least number of runs that each wave adds, if no search goes beyond its three rates."""
    known: set = set()
    counts = {}
    for wave in waves:
        new = {
            (suite, method, *which)
            for suite in wave.suites
            for method in wave.methods
            for which in [
                *([("search", n) for n in range(3)] if METHODS[method].kind != "untuned" else []),
                *[("seed", seed) for seed in wave.seeds],
            ]
        } - known
        known |= new
        counts[wave] = len(new)
    return counts
