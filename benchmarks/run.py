"""Measure mixlora_kernels against the alternatives: ``python benchmarks/run.py``.

Every implementation is first compared with the reference in float64; one that disagrees, or breaks off, is not timed,
and the exit status is 1. A case whose rounds do not fit its share of the time is left out, and said to be. See
``cases/suites.py`` for what is measured and ``harness/measure.py`` for how.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network, and nothing may wait for it
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises on what is not used here
os.environ.setdefault("TEARDOWN_CUPTI", "0")  # else the profiler, which counts launches, breaks later CUDA graphs

import torch

if not torch.cuda.is_available():  # the kernels are then shown in Triton's interpreter, chosen before its import
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cases.suites import SUITES, Setting
from harness import machine
from harness.rounds import Runner, explain
from report import plots, text
from report.summary import summarise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SECONDS = {"cpu": 140.0, "cuda": 360.0}
RESULTS = Path(__file__).resolve().parent / "results" / "local"  # the folders beside it are committed


def main() -> int:
    began = time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT's calls, not ours
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    if arguments.quick:
        torch.set_num_threads(1)  # shapes this small only lose by more
    dtypes = tuple(DTYPES[name] for name in arguments.dtype) or None
    setting = Setting(device, dtypes, arguments.quick, arguments.seed)
    where = machine.describe(device, arguments.commit)
    shown = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    print(f"{where['device']} ({where['cpu']}, {where['threads']} threads), {shown}, commit {where['commit']}")
    out = arguments.out or RESULTS / machine.slug(device)
    out.mkdir(parents=True, exist_ok=True)
    command = command_line(arguments)
    del arguments.out, arguments.commit  # where the results lie is no part of what was measured

    common = {"device": where["device"], "versions": shown, "commit": where["commit"]}
    runner = Runner(device, report=lambda line: print(f"{'':10}{line}", flush=True))
    rows, bars = [], []
    for measured in measure_all(arguments.suite, setting, runner, arguments.seconds, began):
        rows += [row | common for row in measured]
        bars = summarise(rows, setting)  # and written at once: what comes later may break off
        told = vars(arguments) | {"command": command}
        text.write_json(out / "results.json", where, told, bars, rows, runner.failures, runner.left_out)
    drawn, abouts = plots.draw(out, rows, where), {name: suite.about for name, suite in SUITES.items()}
    left_out = [f"{case['suite']}, {case['case']}: {explain(case)}" for case in runner.left_out]
    text.write_markdown(out / "results.md", where, bars, rows, runner.failures, left_out, drawn, command, abouts)

    for suite in arguments.suite:
        own = [row for row in rows if row["suite"] == suite]
        print("\n".join([f"\n{suite}", *text.notes(own), text.table(own) if own else "nothing measured"]))
    if bars:
        print(f"\nsummary{' (quick: not judged)' if setting.quick else ''}\n{text.table(bars, text.BARS)}")
    print(f"\n{len(rows)} rows in {time.perf_counter() - began:.0f} s; results.json, results.md and plots in {out}")
    for line in left_out:
        print(f"left out {line}")
    for failure in runner.failures:
        print(f"FAILED {failure}")
    return 1 if runner.failures else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", action="append", default=[], help=f"{', '.join(SUITES)} or all (default); "
                        "several with commas or by repeating")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", action="append", choices=DTYPES, default=[],
                        help="run every case in this dtype, not in its own; may be repeated")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that all of it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="time to spend on all of it; what must run may take more "
                        "(default 140, on a GPU 360, with --quick 30)")  # fmt: skip
    parser.add_argument("--commit", help="the source's commit, where it is no checkout that git could be asked about")
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results/local/<device>)")
    arguments = parser.parse_args()
    names = [name for given in arguments.suite or ["all"] for name in given.split(",")]
    unknown = set(names) - {*SUITES, "all"}
    if unknown:
        parser.error(f"--suite must be of {', '.join(SUITES)}, all; got {', '.join(sorted(unknown))}")
    arguments.suite = [name for name in SUITES if name in names or "all" in names]
    arguments.seconds = arguments.seconds or (30.0 if arguments.quick else SECONDS[arguments.device])
    return arguments


def command_line(arguments: argparse.Namespace) -> str:
    """A command that runs the same again."""
    flags = [] if len(arguments.suite) == len(SUITES) else [f"--suite {','.join(arguments.suite)}"]
    flags += [f"--device {arguments.device}", *(f"--dtype {name}" for name in arguments.dtype)]
    flags += ["--quick"] if arguments.quick else []
    return " ".join(["python benchmarks/run.py", *flags, f"--seed {arguments.seed}"])


def measure_all(
    names: list[str], setting: Setting, runner: Runner, seconds: float, began: float
) -> Iterator[list[dict]]:
    """The rows of one group after another; each group gets its share of the time that is left when it begins, and at
    least half of what was planned for it. With ``quick``, which is to show that all of it works, all of it runs."""
    planned = [group for name in names for group in SUITES[name].groups(setting)]
    total = sum(group.weight for group in planned)
    for number, group in enumerate(planned):
        elapsed = time.perf_counter() - began
        print(f"{elapsed:4.0f} of about {seconds:.0f} s  {group.suite}: {group.title}", flush=True)
        left = sum(later.weight for later in planned[number:])
        share = group.weight * max((seconds - elapsed) / left, seconds / total / 2)
        yield runner.run(group, share, whatever_it_takes=setting.quick)


if __name__ == "__main__":
    sys.exit(main())
