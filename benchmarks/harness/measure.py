"""Time, in rounds over all candidates so that a noisy machine slows all alike; peak memory; kernel launches."""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import median

import torch

MAX_ROUNDS = 50
LEAST_ROUNDS = 3  # where the machine is too busy for more
TELLING = 0.1  # seconds from which on the time of a part tells that of the whole
L2_BYTES = 256 << 20  # more than any second-level cache
FILLINGS = 32  # of so many bytes each take some 2 ms at 4 TB/s, more than the host needs to queue a layer's kernels


class Candidate:
    """Something to be measured. Its phases run one after the other; each time counts from the first one's start.

    Attributes:
        name: the implementation's. case: with ``name``, ``product`` and ``fields``, as ``problem.Case`` has them.
        every: it takes part in every so-manieth round.
        calls: how often a phase does what a row tells the time of.
        captured: whether, on a GPU, the phases are timed as replays of CUDA graphs.
        bytes, operations: what one call moves at least and multiplies, where that is told.
    """

    every = 1
    calls = 1
    captured = False
    bytes: int | None = None
    operations: int | None = None

    def __init__(self, name: str, case, phases: Mapping[str, Callable[[], object]]):
        self.name, self.case, self.phases = name, case, phases

    def reset(self) -> None:
        """Drop results and gradients."""

    def held(self) -> int:
        """What it keeps from one run to the next and its peak memory is to include, in bytes."""
        return 0

    def trial(self, seconds: float) -> float:
        """A first call: the seconds that its phases take, or are predicted to take from a part of the work, where that
        part shows that they take more than ``seconds``."""
        return time_growing(self._call, 1, seconds)

    def _call(self, _part: int) -> None:
        for phase in self.phases.values():
            phase()
        self.reset()

    def errors(self) -> dict[str, float]:
        """For each pass its error, after the phases have run; nothing where there is nothing to compare with.

        Raises:
            check.Disagreement: an error is beyond its tolerance.
        """
        return {}


class Clock:
    """Runs phases and reads the time at the end of each, in ms: by the wall clock, on a GPU by events.

    There the device first fills a buffer larger than its caches, time and again. That empties them, and keeps it busy
    while the host queues the phases: what is timed is the device's work, as in training, where the host runs ahead.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.filled = torch.empty(L2_BYTES, dtype=torch.uint8, device=device) if self.cuda else None

    def __call__(self, phases: Sequence[Callable[[], None]]) -> list[float]:
        if not self.cuda:
            marks = [time.perf_counter()]
            for phase in phases:
                phase()
                marks.append(time.perf_counter())
            return [(mark - marks[0]) * 1e3 for mark in marks[1:]]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
        torch.cuda.synchronize()
        for value in range(FILLINGS):
            self.filled.fill_(value)
        events[0].record()
        for phase, event in zip(phases, events[1:]):
            phase()
            event.record()
        torch.cuda.synchronize()
        return [events[0].elapsed_time(event) for event in events[1:]]


def time_growing(run: Callable[[int], None], whole: int, seconds: float) -> float:
    """The seconds that ``run(whole)`` takes, which is not run where a part of it shows that it takes more than
    ``seconds``: the part is doubled until then. What two parts differ by tells what the rest takes."""
    part, before = 1, None
    while True:
        began = time.perf_counter()
        run(part)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        taken = time.perf_counter() - began
        more = 0.0 if before is None else max(taken - before, 0.0) / (part - part // 2) * (whole - part)
        if part == whole or (taken >= TELLING and taken + more > seconds):
            return taken + more
        part, before = min(2 * part, whole), taken


def interleave(
    candidates: Sequence[Candidate], clock: Clock, rounds: int, seconds: float
) -> list[list[list[float] | None]]:
    """Time the candidates round by round, in an order drawn anew for each: what a candidate leaves behind, in caches
    and in the allocator, would otherwise always meet the same one.

    Args:
        rounds: how many to run even if they take longer than ``seconds``, up to twice as long; beyond that, as on
            a machine busy with something else, ``LEAST_ROUNDS`` must do.
        seconds: further rounds are run while they are expected to fit into this time.

    Returns:
        For each candidate a list with, for each round, its phases' times in ms a call, or None where it sat out.
    """
    times: list[list[list[float] | None]] = [[] for _ in candidates]
    phases = [list((capture(c) if c.captured and clock.cuda else c.phases).values()) for c in candidates]
    draw = Random(0)
    began = time.perf_counter()
    while (done := len(times[0])) < MAX_ROUNDS:
        expected = (time.perf_counter() - began) * (done + 1) / max(done, 1)
        if (done >= rounds and expected > seconds) or (done >= LEAST_ROUNDS and expected > 2 * seconds):
            break
        for number in draw.sample(range(len(candidates)), len(candidates)):
            candidate = candidates[number]
            if done % candidate.every:
                times[number].append(None)
                continue
            candidate.reset()
            times[number].append([ms / candidate.calls for ms in clock(phases[number])])
            candidate.reset()
    return times


def capture(candidate: Candidate) -> dict[str, Callable[[], None]]:
    """The phases, which have run before, as replays of CUDA graphs."""
    replays = {}
    for name, phase in candidate.phases.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            phase()
        replays[name] = graph.replay
    return replays


def paired_ratio(times: Sequence[float | None], others: Sequence[float | None]) -> float | None:
    """The median over rounds of time / other, of the rounds in which both ran; None if there is no such round.

    On a machine whose speed drifts this is steadier than the ratio of two medians: what slows a round slows both.
    """
    ratios = [a / b for a, b in zip(times, others) if a is not None and b is not None]
    return median(ratios) if ratios else None


def peak_bytes(candidate: Candidate, device: torch.device) -> list[int]:
    """The most memory held at once up to the end of each phase, beyond what was held before the first, in bytes; with
    what the candidate itself held."""
    candidate.reset()
    phases, peaks = candidate.phases.values(), []
    if device.type == "cuda":
        for phase in phases:  # once before, because libraries keep a work space from their first call on
            phase()
        candidate.reset()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated() - candidate.held()
        torch.cuda.reset_peak_memory_stats()
        for phase in phases:
            phase()
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        return peaks
    held = peak = candidate.held()
    for phase in phases:
        for change in allocations(phase):
            held += change
            peak = max(peak, held)
        peaks.append(peak)
    return peaks


def allocations(run: Callable[[], None]) -> list[int]:
    """What run() allocates (positive) and frees (negative) on the CPU, in bytes, in order, as its allocator tells."""
    events = trace(run, torch.profiler.ProfilerActivity.CPU, profile_memory=True)
    changes = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(changes, key=lambda event: event["ts"])]


def count_launches(candidate: Candidate, device: torch.device) -> list[int | None]:
    """What a GPU is given to do up to the end of each phase, in kernels, copies and fillings a call; None on a CPU, and
    where the profiler may not look."""
    candidate.reset()
    counts, total = [], 0
    for phase in candidate.phases.values():
        if device.type == "cuda":
            events = trace(phase, torch.profiler.ProfilerActivity.CUDA)
            total += sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events)
        counts.append(round(total / candidate.calls) or None)
    candidate.reset()
    return counts


def trace(run: Callable[[], None], activity: torch.profiler.ProfilerActivity, **options) -> list[dict]:
    """The profiler's events of run()."""
    with _silent_stderr(), tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=[activity], **options) as profile:
            run()
            if activity is torch.profiler.ProfilerActivity.CUDA:
                torch.cuda.synchronize()
        file = Path(folder, "trace.json")
        profile.export_chrome_trace(str(file))
        return json.loads(file.read_text(encoding="utf-8"))["traceEvents"]


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's own notes come from C++ and know no level: the file descriptor is turned aside."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
