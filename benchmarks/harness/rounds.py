"""From a group of candidates to rows: check, peak memory, time, launches, ratios."""

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch

from .measure import LEAST_ROUNDS, Candidate, Clock, count_launches, interleave, paired_ratio, peak_bytes

RATIOS = ("base", "peft_lora", "published")
COPY = "copy"  # the candidate whose bandwidth the others' is a share of


@dataclass(frozen=True)
class Group:
    """Candidates that are timed together, round by round.

    Attributes:
        build: makes the candidates; reports what it leaves out, and why, to the function it is given.
        rounds: see ``measure.interleave``; 0: nothing is timed.
        weight: its share in the time there is, about the seconds it takes: on two cores, or on one GPU.
        note: what the rows must not be read without.
        threads: on a CPU, if not as many as there are.
    """

    suite: str
    title: str
    build: Callable[[Callable[[str], None]], list[Candidate]]
    rounds: int
    weight: float
    note: str | None = None
    threads: int | None = None


class Examined(NamedTuple):
    """What single runs of a candidate told, by pass."""

    errors: dict[str, float]
    peaks: dict[str, int]
    launches: dict[str, int | None]


class Runner:
    """Runs groups and keeps what it found about a case, so that two suites do not examine it twice.

    Attributes:
        failures: what could not be measured, and why, each in a line.
        left_out: the groups whose rounds did not fit their share of the time: suite, case, and both in seconds.
    """

    def __init__(self, device: torch.device, report: Callable[[str], None]):
        self.device, self.report = device, report
        self.clock = Clock(device)
        self.examined: dict[tuple, Examined] = {}
        self.failures: list[str] = []
        self.left_out: list[dict] = []

    def run(self, group: Group, seconds: float, whatever_it_takes: bool = False) -> list[dict]:
        """The group's rows, a candidate and pass each, in about so many seconds.

        A candidate whose result is wrong, or that breaks off, is not timed and counts among the failures. A group is
        left out if the first calls of its candidates show that the fewest rounds take more than twice the time, unless
        it is to be measured ``whatever_it_takes``.
        """
        began, threads = time.perf_counter(), torch.get_num_threads()
        torch.set_num_threads(group.threads or threads)
        try:
            candidates = group.build(self.report)
            if not (whatever_it_takes or self.fits(group, candidates, seconds)):
                return []
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

    def fits(self, group: Group, candidates: Sequence[Candidate], seconds: float) -> bool:
        """Whether examining the candidates, and the fewest rounds, take less than twice so many seconds; asked of one
        candidate after the other, so that the first one that takes far too long is the last that is called."""
        predicted = 0.0
        for candidate in candidates:
            calls = (self.key(candidate) not in self.examined) + (LEAST_ROUNDS if group.rounds else 0)
            if not calls:
                continue
            left = (2 * seconds - predicted) / calls
            try:
                call = candidate.trial(left)
                if left < call < seconds:  # what the first call has compiled is there now
                    call = candidate.trial(left)
            except Exception:  # told where it is examined
                continue
            predicted += calls * call
            if predicted > 2 * seconds:
                told = {"suite": group.suite, "case": group.title}
                told |= {"predicted_seconds": round(predicted, 1), "share_seconds": round(seconds, 1)}
                self.left_out.append(told)
                self.report(f"left out: {explain(told)}")
                return False
        return True

    def examine(self, candidate: Candidate) -> bool:
        """Run it for its peak memory and its launches, and compare its results with what they should be.

        Returns:
            Whether it may be timed.
        """
        if self.key(candidate) in self.examined:
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
        self.examined[self.key(candidate)] = Examined(errors, peaks, launches)
        return True

    @staticmethod
    def key(candidate: Candidate) -> tuple:
        return candidate.case, candidate.name, tuple(candidate.phases)

    def fail(self, what: str, error: Exception) -> None:
        traceback.print_exception(error)
        self.failures.append(f"{what}: {type(error).__name__}: {error}")
        self.report(f"FAILED {self.failures[-1]}")
        traceback.clear_frames(error.__traceback__)  # which hold tensors

    def rows(self, group: Group, candidate: Candidate, rounds: Sequence) -> list[tuple[tuple, dict]]:
        """A row for each pass, with the frozen product that its ratios refer to."""
        found = self.examined[self.key(candidate)]
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


def explain(left_out: dict) -> str:
    """Why a group was left out, in words."""
    predicted, share = left_out["predicted_seconds"], left_out["share_seconds"]
    return f"its fewest rounds would take at least {predicted:.0f} s, its share of the time is {share:.0f} s"


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
