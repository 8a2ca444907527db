"""Make the mistakes, each in a copy of the tree of its own, and see which of them the tests let pass.

    python -m tests.mutations [--list] [PATTERN ...]

Of the mutations whose name contains a PATTERN (all of them without one) each copy is changed in one place, and the
tests that should notice are run. First the same tests are run unchanged: where they fail anyway, a failure says
nothing. The exit status is 1 if a mutation survives, or if its tests could not judge it.

Races and accesses out of bounds ("memory: ...") are looked for by ttsem, which runs Triton's kernels on a CPU; without
it they are left out, unless they were asked for:

    pip install --no-deps --ignore-requires-python ttsem==0.1.0
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import Mutation, kernels, layer, memory, peft, serving

ROOT = Path(__file__).resolve().parents[2]
MUTATIONS = [*layer.MUTATIONS, *kernels.MUTATIONS, *memory.MUTATIONS, *peft.MUTATIONS, *serving.MUTATIONS]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "results", "*.egg-info", "build", "dist", "site")
CAUGHT, SURVIVED, UNCLEAR = "caught", "SURVIVED", "UNCLEAR"
SECONDS = 600  # of a mutation's tests; what then still runs hangs, which is noticed too


def main() -> int:
    arguments = parse_arguments()
    chosen = select(arguments.patterns)
    if arguments.list:
        print("\n".join(f"{mutation.what}: {mutation.file}, {mutation.tests}" for mutation in chosen))
        return 0
    unchanged = dict.fromkeys((mutation.tests, mutation.sanitized) for mutation in chosen)
    sound = {tests: run(*tests).status for tests in unchanged}
    verdicts = []
    for mutation in chosen:
        began = time.perf_counter()
        found = UNCLEAR
        if not sound[mutation.tests, mutation.sanitized]:
            found = judge(mutation, run(mutation.tests, mutation.sanitized, mutation))
        verdicts.append(found)
        print(f"{found:8} {time.perf_counter() - began:6.1f} s  {mutation.what} ({mutation.tests})", flush=True)
    left = {verdict: verdicts.count(verdict) for verdict in (CAUGHT, SURVIVED, UNCLEAR)}
    print(", ".join(f"{count} {verdict}" for verdict, count in left.items()))
    return 0 if verdicts and left[CAUGHT] == len(verdicts) else 1


def select(patterns: Sequence[str]) -> list[Mutation]:
    """Those whose name, or file, contains one of the patterns; without one, all that can be run."""
    if not patterns:
        sanitizes = importlib.util.find_spec("ttsem") is not None
        return [m for m in MUTATIONS if sanitizes or not m.sanitized]
    return [m for m in MUTATIONS if any(p in m.what or p in m.file for p in patterns)]


class Outcome(NamedTuple):
    status: int | None  # pytest's; None: it did not end
    text: str = ""


def run(tests: str, sanitized: bool, mutation: Mutation | None = None) -> Outcome:
    """The tests in a copy of the tree with the mutation in it."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        if mutation is not None:
            apply(mutation, tree)
        program = ["ttsem.sanitize", "pytest"] if sanitized else ["pytest"]
        command = [sys.executable, "-B", "-m", *program, "-x", "-q", "-p", "no:cacheprovider", tests]
        environment = os.environ | {"PYTHONPATH": str(tree)}  # before a package that is installed
        try:
            done = subprocess.run(
                command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS, errors="replace"
            )
        except subprocess.TimeoutExpired:
            return Outcome(None)
        return Outcome(done.returncode, done.stdout)


def apply(mutation: Mutation, tree: Path) -> None:
    """Raise a ValueError unless the text to be changed stands there once."""
    file = tree / mutation.file
    text = file.read_text(encoding="utf-8")
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(
            f"{mutation.what}: {mutation.file} has {mutation.old!r} {count} times, and it has to be there once. Where "
            "the code has changed, change the mutation with it"
        )
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def judge(mutation: Mutation, outcome: Outcome) -> str:
    """pytest exits with 1 where tests fail. With 2 to 5 it could not run them, or there were none."""
    if mutation.sanitized and outcome.status == 1 and "KernelFault" not in outcome.text:
        return SURVIVED  # a wrong value was noticed, not the access
    return {0: SURVIVED, 1: CAUGHT, None: CAUGHT}.get(outcome.status, UNCLEAR)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.partition("\n")[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="a part of a mutation's name or file")
    parser.add_argument("--list", action="store_true", help="name them and change nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
