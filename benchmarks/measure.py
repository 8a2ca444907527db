"""Time, in rounds over all candidates so that a noisy machine slows all alike, and peak memory."""

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
from typing import Protocol

import torch

MAX_ROUNDS = 50
LEAST_ROUNDS = 3  # where the machine is too busy for more
L2_BYTES = 256 << 20  # more than any second-level cache


class Candidate(Protocol):
    """Something to be measured. Its phases run one after the other; each time counts from the first one's start."""

    every: int  # it takes part in every so-manieth round
    phases: Mapping[str, Callable[[], None]]

    def reset(self) -> None:
        """Drop results and gradients."""


class Clock:
    """Runs phases and reads the time at the end of each, in ms: by events on a GPU, else by the wall clock."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.flushed = torch.empty(L2_BYTES, dtype=torch.uint8, device=device) if self.cuda else None

    def __call__(self, phases: Sequence[Callable[[], None]]) -> list[float]:
        if not self.cuda:
            marks = [time.perf_counter()]
            for phase in phases:
                phase()
                marks.append(time.perf_counter())
            return [(mark - marks[0]) * 1e3 for mark in marks[1:]]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
        self.flushed.zero_()
        torch.cuda.synchronize()
        events[0].record()
        for phase, event in zip(phases, events[1:]):
            phase()
            event.record()
        torch.cuda.synchronize()
        return [events[0].elapsed_time(event) for event in events[1:]]


def interleave(candidates: Sequence[Candidate], clock: Clock, rounds: int, seconds: float) -> list[list[list | None]]:
    """Time the candidates round by round, in an order drawn anew for each: what a candidate leaves behind, in caches
    and in the allocator, would otherwise always meet the same one.

    Args:
        rounds: how many to run even if they take longer than ``seconds``, up to twice as long; beyond that, as on
            a machine busy with something else, ``LEAST_ROUNDS`` must do.
        seconds: further rounds are run while they are expected to fit into this time.

    Returns:
        For each candidate a list with, for each round, its phases' times in ms, or None where it sat out.
    """
    times: list[list[list | None]] = [[] for _ in candidates]
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
            times[number].append(clock(list(candidate.phases.values())))
            candidate.reset()
    return times


def paired_ratio(times: Sequence[float | None], others: Sequence[float | None]) -> float | None:
    """The median over rounds of time / other, of the rounds in which both ran; None if there is no such round.

    On a machine whose speed drifts this is steadier than the ratio of two medians: what slows a round slows both.
    """
    ratios = [a / b for a, b in zip(times, others) if a is not None and b is not None]
    return median(ratios) if ratios else None


def peak_bytes(candidate: Candidate, device: torch.device) -> list[int]:
    """The most memory held at once up to the end of each phase, beyond what was held before the first, in bytes."""
    candidate.reset()
    phases, peaks = candidate.phases.values(), []
    if device.type == "cuda":
        for phase in phases:  # once before, because libraries keep a work space from their first call on
            phase()
        candidate.reset()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for phase in phases:
            phase()
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        return peaks
    held = peak = 0
    for phase in phases:
        for change in allocations(phase):
            held += change
            peak = max(peak, held)
        peaks.append(peak)
    return peaks


def allocations(run: Callable[[], None]) -> list[int]:
    """What run() allocates (positive) and frees (negative) on the CPU, in bytes, in order, as its allocator tells."""
    with _silent_stderr(), tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(changes, key=lambda event: event["ts"])]


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
