"""Measure mixlora_kernels against the alternatives: ``python benchmarks/run.py``.

Every implementation is first compared with the reference in float64; one that disagrees ends the run. See
``suites.py`` for what is measured and ``measure.py`` for how.
"""

import argparse
import os
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network, and nothing may wait for it
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises on what is not used here

import machine
import plots
import report
import suites
import torch
from rounds import Runner
from summary import summarise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    began = time.perf_counter()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT's calls, not ours
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    dtypes = tuple(DTYPES[name] for name in arguments.dtype) or None
    setting = suites.Setting(device, dtypes, arguments.quick, arguments.seed)
    where = machine.describe(device)
    shown = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    print(f"{where['device']} ({where['cpu']}, {where['threads']} threads), {shown}, commit {where['commit']}")

    rows = measure_all(arguments.suite, setting, arguments.seconds, began)
    common = {"device": where["device"], "versions": shown, "commit": where["commit"]}
    rows = [row | common for row in rows]
    bars = summarise(rows, setting)

    out = arguments.out or RESULTS / machine.slug(device)
    out.mkdir(parents=True, exist_ok=True)
    del arguments.out  # where the results lie is no part of what was measured
    command = command_line(arguments)
    drawn = plots.draw(out, rows, where["device"])
    report.write_json(out / "results.json", where, vars(arguments) | {"command": command}, bars, rows)
    report.write_markdown(out / "results.md", where, bars, rows, drawn, command)

    for suite in arguments.suite:
        print(f"\n{suite}\n{report.table([row for row in rows if row['suite'] == suite])}")
    if bars:
        print(f"\nsummary{' (quick: not judged)' if setting.quick else ''}\n{report.summary_table(bars)}")
    print(f"\n{len(rows)} rows in {time.perf_counter() - began:.0f} s; results.json, results.md and plots in {out}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", action="append", default=[], help=f"{', '.join(suites.NAMES)} or all (default); "
                        "several with commas or by repeating")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", action="append", choices=DTYPES, default=[],
                        help="run every case in this dtype, not in its own; may be repeated")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that all of it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="time to spend on all of it; what must run may take more "
                        "(default 140, with --quick 30)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results/<device>)")
    arguments = parser.parse_args()
    names = [name for given in arguments.suite or ["all"] for name in given.split(",")]
    unknown = set(names) - {*suites.NAMES, "all"}
    if unknown:
        parser.error(f"--suite must be of {', '.join(suites.NAMES)}, all; got {', '.join(sorted(unknown))}")
    arguments.suite = [name for name in suites.NAMES if name in names or "all" in names]
    arguments.seconds = arguments.seconds or (30.0 if arguments.quick else 140.0)
    return arguments


def command_line(arguments: argparse.Namespace) -> str:
    """A command that runs the same again."""
    flags = [] if len(arguments.suite) == len(suites.NAMES) else [f"--suite {','.join(arguments.suite)}"]
    flags += [f"--device {arguments.device}", *(f"--dtype {name}" for name in arguments.dtype)]
    flags += ["--quick"] if arguments.quick else []
    return " ".join(["python benchmarks/run.py", *flags, f"--seed {arguments.seed}"])


def measure_all(names: list[str], setting: suites.Setting, seconds: float, began: float) -> list[dict]:
    """The rows of all groups; each group gets its share of the time that is left when it begins, and at least half
    of what was planned for it."""
    planned = [group for name in names for group in suites.groups(name, setting)]
    total = sum(group.weight for group in planned)
    runner = Runner(setting.device, report=lambda text: print(f"{'':10}{text}", flush=True))
    rows = []
    for number, group in enumerate(planned):
        elapsed = time.perf_counter() - began
        print(f"{elapsed:4.0f} of about {seconds:.0f} s  {group.suite}: {group.title}", flush=True)
        left = sum(later.weight for later in planned[number:])
        rows += runner.run(group, group.weight * max((seconds - elapsed) / left, seconds / total / 2))
    return rows


if __name__ == "__main__":
    main()
