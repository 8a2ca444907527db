"""From a group of candidates to rows: check, peak memory, time, launches, ratios."""

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy
import torch
from measure import Candidate, Clock, count_launches, interleave, paired_ratio, peak_bytes
from suites import Group

RATIOS = ("base", "peft_lora", "published")
COPY = "copy"  # the candidate whose bandwidth the others' is a share of


class Examined(NamedTuple):
    """What single runs of a candidate told, by pass."""

    errors: dict[str, float]
    peaks: dict[str, int]
    launches: dict[str, int | None]


class Runner:
    """Runs groups and keeps what it found about a case, so that two suites do not examine it twice.

    Attributes:
        failures: what could not be measured, and why, each in a line.
    """

    def __init__(self, device: torch.device, report: Callable[[str], None]):
        self.device, self.report = device, report
        self.clock = Clock(device)
        self.examined: dict[tuple, Examined] = {}
        self.failures: list[str] = []

    def run(self, group: Group, seconds: float) -> list[dict]:
        """The group's rows, a candidate and pass each, in about so many seconds (or what the fewest rounds take).

        A candidate whose result is wrong, or that breaks off, is not timed and counts among the failures.
        """
        began, threads = time.perf_counter(), torch.get_num_threads()
        torch.set_num_threads(group.threads or threads)
        try:
            candidates = group.build(self.report)
            candidates = [candidate for candidate in candidates if self.examine(candidate)]
            times = [[] for _ in candidates]
            if group.rounds and candidates:
                left = seconds - (time.perf_counter() - began)
                times = interleave(candidates, self.clock, group.rounds, left)
            rows = [row for candidate, rounds in zip(candidates, times) for row in self.rows(group, candidate, rounds)]
            return [finish(row, product, rows) for product, row in rows]
        except Exception as error:  # what is measured of the others is worth keeping
            self.fail(f"{group.suite}, {group.title}", error)
            return []
        finally:
            candidates = None
            torch.set_num_threads(threads)
            if self.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()

    def examine(self, candidate: Candidate) -> bool:
        """Run it for its peak memory and its launches, and compare its results with what they should be.

        Returns:
            Whether it may be timed.
        """
        key = candidate.case, candidate.name, tuple(candidate.phases)
        if key in self.examined:
            return True
        try:
            peaks = dict(zip(candidate.phases, peak_bytes(candidate, self.device)))
            errors = candidate.errors()
        except Exception as error:
            self.fail(f"{candidate.name} at {candidate.case.name}", error)
            return False
        try:
            launches = dict(zip(candidate.phases, count_launches(candidate, self.device)))
        except Exception as error:  # the profiler's troubles are no reason not to time
            self.fail(f"launches of {candidate.name} at {candidate.case.name}", error)
            launches = dict.fromkeys(candidate.phases)
        self.examined[key] = Examined(errors, peaks, launches)
        return True

    def fail(self, what: str, error: Exception) -> None:
        traceback.print_exception(error)
        self.failures.append(f"{what}: {type(error).__name__}: {error}")
        self.report(f"FAILED {self.failures[-1]}")
        traceback.clear_frames(error.__traceback__)  # which hold tensors

    def rows(self, group: Group, candidate: Candidate, rounds: Sequence) -> list[tuple[tuple, dict]]:
        """A row for each pass, with the frozen product that its ratios refer to."""
        found = self.examined[candidate.case, candidate.name, tuple(candidate.phases)]
        passes = {}
        for number, name in enumerate(candidate.phases):
            passes[name] = {
                "rounds_ms": [None if phases is None else phases[number] for phases in rounds],
                "peak_bytes": found.peaks[name],
                "launches": found.launches[name],
                "error": found.errors.get(name),
            }
        if rounds and passes.keys() >= {"forward", "forward+backward"}:
            passes["backward"] = difference(passes["forward+backward"], passes["forward"])
        fixed = {"suite": group.suite, **candidate.case.fields, "implementation": candidate.name}
        told = {"bytes": candidate.bytes, "operations": candidate.operations, "note": group.note}
        return [(candidate.case.product, fixed | {"pass": name} | row | told) for name, row in passes.items()]


def difference(whole: dict, part: dict) -> dict:
    """What the passes that ``whole`` has beyond ``part`` take, round by round. Their peak and error are the whole's."""
    pairs = zip(whole["rounds_ms"], part["rounds_ms"])
    launches = (whole["launches"], part["launches"])
    return {
        "rounds_ms": [None if a is None else a - b for a, b in pairs],
        "peak_bytes": None,
        "launches": None if None in launches else launches[0] - launches[1],
        "error": None,
    }


def finish(row: dict, product: tuple, rows: Sequence[tuple[tuple, dict]]) -> dict:
    """The row with its quantiles, its ratios to the other implementations of the same frozen product, and its
    bandwidth as a share of a plain copy's."""
    samples = [ms for ms in row["rounds_ms"] if ms is not None]
    quantiles = numpy.quantile(samples, (0.5, 0.2, 0.8)).tolist() if samples else [None] * 3
    result = row | dict(zip(("median_ms", "p20_ms", "p80_ms"), quantiles)) | {"rounds": len(samples)}
    for name in RATIOS:
        wanted = name, row["pass"]
        others = (o for its, o in rows if its == product and (o["implementation"], o["pass"]) == wanted)
        other = next(others, None)
        result[f"ratio_to_{name}"] = paired_ratio(row["rounds_ms"], other["rounds_ms"]) if other else None
    for name in ("bytes", "operations"):
        told = samples and row[name]
        result[f"{name}_per_second"] = row[name] / result["median_ms"] * 1e3 if told else None
    copy = next((other for _, other in rows if other["implementation"] == COPY), None)
    result["share_of_copy"] = None
    if copy and result["bytes_per_second"]:
        slower = paired_ratio(copy["rounds_ms"], row["rounds_ms"])
        result["share_of_copy"] = row["bytes"] / copy["bytes"] * slower
    return result
