"""Do the runs of a plan, several at a time. A stopped plan resumes where it stopped."""

import os
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import torch

from ..refusal import Refusal
from . import base as bases
from . import plan, records
from .tuning import Run, run


def start_worker() -> None:
    """Use one thread for a run, because products of this size gain nothing from a second."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)


def make_base(recipe: bases.Recipe, results: Path) -> bases.Base:
    """Make the base in a worker too, which has one thread, so that its sums do not depend on the number of threads."""
    return bases.make(recipe, results)


def carry_out(spec: Run, base: bases.Base, count: int | None, made: dict) -> records.Record:
    """Do one run, and return its raw result. A training that diverged has one too."""
    started, computing = time.monotonic(), time.process_time()
    try:
        found = run(spec, base, count)
    except FloatingPointError as error:
        found = {"failed": str(error)}
    found |= {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - computing}
    return records.Record(spec, found, base.digest, made)


def go_on(
    results: Path, recipe: bases.Recipe, waves: tuple[plan.Wave, ...], steps: dict[str, int], *,
    workers: int, count: int | None = None, seconds: float | None = None,
) -> list[records.Record]:  # fmt: skip
    """Do the missing runs of a plan.

    Args:
        results: the folder with the base, and with the raw results in ``runs``. Each run adds a file.
        workers: the number of runs at a time. Each has one thread.
        count: the number of questions of each split.
        seconds: the time after which no more runs are started.

    Raises:
        ValueError: the search for a learning rate was begun with another base.
    """
    folder = results / "runs"
    os.environ["OMP_NUM_THREADS"] = "1"  # before a worker starts, because it changes the order of sums
    began, made = time.monotonic(), records.made()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker) as pool:
        base = pool.submit(make_base, recipe, results).result()
        print(f"base {base.digest}: captions right by word {base.seen}", flush=True)
        done = {record.run._replace(detail=False): record for record in records.read(folder)}
        if begun := plan.begun(records.choices(r for r in done.values() if r.base != base.digest), steps):
            raise Refusal(
                f"{folder} holds unfinished searches for a learning rate with another base than {base.digest}, which "
                f"cannot go on with this one: remove {', '.join(sorted(run.name for run in begun))}"
            )
        running: dict[Future, Run] = {}
        while True:
            found = records.choices(done.values())
            late = seconds is not None and time.monotonic() - began > seconds
            for spec in plan.ordered(found, waves, steps):
                if late or len(running) == workers:
                    break
                place = spec._replace(detail=False)
                if place not in done and place not in running.values():
                    running[pool.submit(carry_out, spec, base, count, made)] = place
            if not running:
                return list(done.values())
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                record = future.result()
                records.write(folder, record)
                done[running.pop(future)] = record
                print(line(record, len(done)), flush=True)


def line(record: records.Record, number: int) -> str:
    found = record.found
    said = found.get("failed") or ", ".join(f"{k} {v:.1f} %" for k, v in found["accuracy"].items() if v is not None)
    return f"{number}: {record.run.name}: {said}; {found['seconds']:.0f} s, {found['cpu_seconds']:.0f} s of computing"
