"""Repeat the study that compares MixLoRA with LoRA.

    mixlora study run [--quick]      # train the base model, do the missing runs, write the report
    mixlora study report             # write the report again from the raw results
    mixlora study time               # measure the time of training steps while nothing else runs
    mixlora study plan               # list the runs and the time that they take

A study that was stopped resumes where it stopped. Raw results are those of --results: the repository has them in
integration/mixlora_llava/study/results, and --quick makes others. "mixlora study report --quick" repeats their report.
"""

import argparse
from pathlib import Path

from .values import amount, count, place

REPOSITORY = Path(__file__).parents[1] / "study" / "results"  # an editable installation has it, a wheel does not
RESULTS = REPOSITORY if REPOSITORY.is_dir() else Path("llava_study")
QUICK_RESULTS = Path("llava_study_quick")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["run", "report", "time", "plan"], nargs="?", default="run")
    parser.add_argument("--quick", action="store_true", help="a small base and four methods: minutes instead of hours")
    parser.add_argument("--workers", type=count, default=2, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=amount, help="after which no run is begun any more")
    parser.add_argument(
        "--results", type=place, help=f"folder of the base and of runs/; by default {QUICK_RESULTS} with --quick, and "
        "otherwise the repository's own if the package was installed from it with -e, or llava_study",
    )  # fmt: skip
    parser.add_argument("--seconds", type=amount, help="of a run of 400 steps, for plan; by default as measured")


def run(options: argparse.Namespace) -> None:
    from ..study import base, plan, report, timing, work

    results = options.results or (QUICK_RESULTS if options.quick else RESULTS)
    recipe, *planned = (
        (base.QUICK, plan.QUICK, plan.QUICK_STEPS) if options.quick else (base.Recipe(), plan.FULL, plan.STEPS)
    )
    if options.what == "plan":
        print(report.plan_text(results / "runs", options.seconds, *planned))
        return
    if options.what == "time":
        timing.write(results, base.make(recipe, results))
    if options.what == "run":
        work.go_on(
            results, recipe, *planned, workers=options.workers, count=160 if options.quick else None,
            seconds=options.minutes and 60 * options.minutes,
        )  # fmt: skip
    print(report.write(results))
