"""Write the report. All its statements are computed from the raw results in its folder."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median

from ..refusal import Refusal
from . import figures, plan, records, tables, timing
from .comparison import CONFIDENCE, by_seed, summary
from .methods import METHODS
from .pictures import SPLITS
from .records import Record
from .tables import Cells, all_differences, cells, grid
from .tuning import BATCH


def write(folder: Path) -> Path:
    """Write ``report.md``, ``summary.json`` and the pictures beside ``runs/``. Return the report's path.

    Raises:
        ValueError: there are no raw results.
    """
    found = records.read(folder / "runs")
    if not found:
        raise Refusal(
            f"{folder / 'runs'} has no raw results: give their folder with --results, or make them with "
            "mixlora study run"
        )
    table = cells(found)
    drawn = figures.draw(folder, found, table)
    parts = [
        head(found),
        several_bases(found),
        tables.headline(found),
        tables.differences(table),
        tables.confirmation(found),
        tables.everything(table),
        tables.rates(found),
        tables.costs(table, timing.read(folder)),
        tables.mechanism(table),
        pictures(drawn),
        provenance(found),
    ]
    (folder / "report.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(as_json(table), indent=1) + "\n", encoding="utf-8")
    return folder / "report.md"


def as_json(table: Cells) -> dict:
    """The report's accuracies and differences as numbers."""
    accuracies = {
        f"{suite}.{method}.{measure}": summary(by_seed(rows, measure))
        for (suite, method), rows in table.items()
        for measure in ("report", "unseen")
    }
    apart = {f"{suite}.{one}-{other}": found for suite, one, other, found in all_differences(table)}
    return {
        "accuracy": {name: found._asdict() for name, found in accuracies.items() if found is not None},
        "difference": {name: found._asdict() for name, found in apart.items()},
    }


def head(found: list[Record]) -> str:
    parts = ", ".join(
        f"{count:,} for {name}" for name, count in zip(("training", "choosing", "reporting"), SPLITS.values())
    )
    return f"""# When is MixLoRA better than LoRA?

{len(found)} runs. A small LLaVA, pretrained once, is tuned on suites of instructions about handwritten digits: pictures
are split into {parts}. Every method sees the same {BATCH} instructions in every step of a seed, and takes the same
number of steps. Its learning rate is searched with seed {plan.SEARCHED}, among three rates a factor of two apart and
beyond them while the best is at an end, by the accuracy on the choosing pictures; what is reported are other seeds on
the reporting pictures. A suite's mappings, and which instructions are unseen, are drawn anew for every seed. An answer
counts when `generate`, greedily, gives exactly its words. Accuracies are in percent, mean ± standard deviation over
seeds, their number in parentheses; intervals are Student's, {CONFIDENCE:.0%}, of differences paired by seed.

Suites: `conflict8` and `conflict32`, as many code words, each with its own mapping of digits (every second also of
inks, so that its answers have two words); `many`, fifty instructions of arithmetic and sight, a fifth of them unseen in
training; `related`, six instructions that need the same sight. "preset tied()" is `ConditionalMixLoRAConfig.tied()`:
tied pairs, normalized gate, routed by the prompt's text, with a load-balancing loss. The size of the model and the
pictures are one each: the intervals say nothing about others."""


def several_bases(found: list[Record]) -> str:
    """Say which seeds belong to which base, and which methods ran with more than one, if there are several."""
    seeds: dict[str, set[int]] = defaultdict(set)
    bases: dict[str, set[str]] = defaultdict(set)
    for record in sorted(found, key=lambda record: record.made["date"]):
        seeds[record.base].add(record.run.seed)
        bases[record.run.method].add(record.base)
    if len(seeds) == 1:
        return ""
    said = "; ".join(f"{base} with the seeds {', '.join(map(str, sorted(own)))}" for base, own in seeds.items())
    several = ", ".join(f'"{METHODS[method].label}"' for method in METHODS if len(bases[method]) > 1)
    return (
        f"There are {len(seeds)} bases, trained alike on different processors: {said}. Differences are paired by base "
        f"and seed. With more than one base ran {several}: the interval of a difference between two of these includes "
        "the base, and that of any other does not. A rate that was searched with one base is used with all."
    )


def pictures(drawn: dict[str, str]) -> str:
    shown = [f"![{title}]({name})\n\n{title}" for name, title in drawn.items()]
    return "\n\n".join(["## Pictures", *shown]) if shown else ""


def provenance(found: list[Record]) -> str:
    made = [record.made for record in found]
    versions = Counter(json.dumps(one["versions"]) for one in made)
    named = "; ".join(", ".join(f"{k} {v}" for k, v in json.loads(one).items()) for one in versions)
    hours = sum(record.found["cpu_seconds"] for record in found) / 3600

    def every(field: str) -> str:
        return ", ".join(sorted({str(one[field]) for one in made}))

    dates, bases = sorted(one["date"] for one in made), ", ".join(sorted({record.base for record in found}))
    return f"""## Made with

{named}; Python {every("python")}; commits {every("commit")}; {every("cpu")}; base {bases}; runs begun from
{dates[0]} to {dates[-1]}; {hours:.1f} hours of one core.
`mixlora study report` draws everything again from the raw results in `runs/`, and
`mixlora study run` goes on with what is missing."""


def plan_text(
    folder: Path,
    seconds: float | None = None,
    waves: tuple[plan.Wave, ...] = plan.FULL,
    steps: Mapping[str, int] = plan.STEPS,
) -> str:
    """The plan as Markdown: the waves in order, with the number of their runs and the time that they take.

    Args:
        folder: the folder of raw results, from which the time of a run is estimated.
        seconds: the time of a run of 400 steps, if there are no raw results.
        waves, steps: the plan's runs, and the steps of a run of each suite.

    Raises:
        ValueError: there is neither.
    """
    done = records.read(folder) if folder.is_dir() else []
    if seconds is None:
        each = [400 * record.found["cpu_seconds"] / record.run.steps for record in done if "step_ms" in record.found]
        if not each:
            raise Refusal(
                f"{folder} has no finished run whose time could be used: give a folder with raw results as --results, "
                "or the time of a run of 400 steps as --seconds"
            )
        seconds = median(each)
    rows, runs, total = [], 0, 0.0
    for number, (wave, count) in enumerate(plan.least(waves).items(), 1):
        lengths = mean(plan.steps(suite, method, steps) for suite in wave.suites for method in wave.methods)
        takes = count * seconds * lengths / 400
        runs, total = runs + count, total + takes
        rows.append([
            str(number), ", ".join(wave.suites), ", ".join(wave.methods), ", ".join(map(str, wave.seeds)), str(count),
            f"{takes / 3600:.1f}",
        ])  # fmt: skip
    return (
        "# The plan\n\nWritten before the first of its runs. What matters most comes first; a run is carried out once, "
        f"whichever rows need it. Every method's learning rate is searched with seed {plan.SEARCHED}: three rates, and "
        "beyond them while the best is at an end, which the counts leave out.\n\n"
        + grid(["wave", "suites", "methods", "seeds", "runs at least", "hours of one core"], rows)
        + f"\n\n{runs} runs at least, {total / 3600:.1f} hours of one core, {total / 7200:.1f} on two: {seconds:.0f} s "
        f"of computing for a run of 400 steps. Steps of a run: {', '.join(f'{k} {v}' for k, v in steps.items())}."
    )
