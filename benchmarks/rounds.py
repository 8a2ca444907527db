"""From a group of candidates to rows: check, peak memory, time, ratios."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy
import torch
from measure import Clock, interleave, paired_ratio, peak_bytes
from suites import Group

RATIOS = ("base", "peft_lora", "published")


class Examined(NamedTuple):
    """What one run of a candidate told, by pass."""

    errors: dict[str, float]
    peaks: dict[str, int]


class Runner:
    """Runs groups and keeps what it found about a case, so that two suites do not examine it twice."""

    def __init__(self, device: torch.device, report: Callable[[str], None]):
        self.device, self.report = device, report
        self.clock = Clock(device)
        self.examined: dict[tuple, Examined] = {}

    def run(self, group: Group, seconds: float) -> list[dict]:
        """The group's rows, a candidate and pass each, in about so many seconds (or what the fewest rounds take).

        Raises:
            check.Disagreement: a candidate's result is wrong; nothing was timed.
        """
        began = time.perf_counter()
        candidates = group.build(self.report)
        examined = [self.examine(candidate) for candidate in candidates]
        times = [[] for _ in candidates]
        if group.rounds:
            left = seconds - (time.perf_counter() - began)
            times = interleave(candidates, self.clock, group.rounds, left)
        rows = []
        for candidate, found, rounds in zip(candidates, examined, times):
            for number, name in enumerate(candidate.phases):
                row = {"suite": group.suite, **candidate.case.fields, "implementation": candidate.name, "pass": name}
                row["rounds_ms"] = [None if phases is None else phases[number] for phases in rounds]
                row |= {"peak_bytes": found.peaks[name], "error": found.errors[name]}
                rows.append((candidate.case.product, row))
        return [finish(row, product, rows) for product, row in rows]

    def examine(self, candidate) -> Examined:
        """Run it once for its peak memory, and compare the results of that run with what they should be."""
        key = candidate.case, candidate.name, tuple(candidate.phases)
        if key not in self.examined:
            peaks = dict(zip(candidate.phases, peak_bytes(candidate, self.device)))
            self.examined[key] = Examined(candidate.errors(), peaks)
            candidate.reset()
        return self.examined[key]


def finish(row: dict, product: tuple, rows: Sequence[tuple[tuple, dict]]) -> dict:
    """The row with its quantiles, and its ratios to the other implementations of the same frozen product."""
    samples = [ms for ms in row["rounds_ms"] if ms is not None]
    quantiles = numpy.quantile(samples, (0.5, 0.2, 0.8)).tolist() if samples else [None] * 3
    result = row | dict(zip(("median_ms", "p20_ms", "p80_ms"), quantiles)) | {"rounds": len(samples)}
    for name in RATIOS:
        other = next(
            (
                other
                for its_product, other in rows
                if its_product == product and (other["implementation"], other["pass"]) == (name, row["pass"])
            ),
            None,
        )
        result[f"ratio_to_{name}"] = paired_ratio(row["rounds_ms"], other["rounds_ms"]) if other else None
    return result
