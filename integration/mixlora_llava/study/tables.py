"""Compute the report's tables from the raw results."""

from collections import defaultdict
from collections.abc import Iterable
from statistics import mean, median

from . import plan, records
from .comparison import Difference, Summary, by_seed, difference, summary
from .methods import METHODS
from .records import Record

CONFIRMING = 11  # runs with this seed or a higher one confirm a row, and are not part of it
RIVALS = ("lora_r4", "lora_r16", "lora_r24", "paper")
AT_8 = ("lora_r4_scaling8", "lora_r16_scaling8", "lora_r24_scaling8")
PAIRS = (
    *[("tied_normalized", rival) for rival in (*RIVALS, *AT_8, "lora_r62", "tied", "normalized", "fixed")],
    *[("paper", rival) for rival in ("lora_r4", "lora_r16", "lora_r62", "random", "unconditional", "released")],
    ("normalized", "paper"),
    ("tied", "paper"),
    *[(at_8, at_8.removesuffix("_scaling8")) for at_8 in AT_8],
    ("paper_scaling2", "paper"),
    ("specialists_r4", "lora_r4"),
    *[("tied_normalized_prompt", rival) for rival in (*RIVALS, *AT_8, "tied_normalized")],
    *[("tied_text_balanced", rival) for rival in (*RIVALS, *AT_8, "tied_normalized_prompt", "tied_text", "fixed")],
    *[("tied_text_balanced", rival) for rival in ("tied_balanced", "lora_r62")],
    ("tied_text_balanced_longer", "lora_r24_scaling8_longer"),
    ("tied_text_balanced_longer", "lora_r16_longer"),
    ("tied_normalized_longer", "lora_r4_longer"),
    ("tied_normalized_longer", "paper_longer"),
)
CONFIRMED = (PAIRS[0], *[("tied_text_balanced", rival) for rival in (*AT_8[1:], "tied_normalized")])
Cells = dict[tuple[str, str], list[Record]]


def cells(found: Iterable[Record], confirming: bool = False) -> Cells:
    """The reported runs by suite and method, which are those with other seeds than the search's."""
    rows: Cells = defaultdict(list)
    for record in found:
        seed = record.run.seed
        if seed != plan.SEARCHED and (seed >= CONFIRMING) == confirming and "failed" not in record.found:
            rows[record.run.suite, record.run.method].append(record)
    return dict(rows)


def all_differences(table: Cells) -> list[tuple[str, str, str, Difference]]:
    """The differences of all pairs of methods in all suites in which both have a common seed."""
    found = []
    for suite in plan.STEPS:
        for one, other in PAIRS:
            rows = (table.get((suite, one), []), table.get((suite, other), []))
            if (apart := difference(*map(by_seed, rows))) is not None:
                found.append((suite, one, other, apart))
    return found


def headline(found: list[Record]) -> str:
    """The headline rows, in a table for each base: accuracies of different bases are not compared."""
    by_base: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(found, key=lambda record: record.made["date"], reverse=True):
        by_base[record.base].append(record)
    parts = [
        f"The base {base}:\n\n{rows}" if len(by_base) > 1 else rows
        for base, records in by_base.items() if (rows := headline_rows(cells(records)))
    ]  # fmt: skip
    return "\n\n".join(["## The methods that matter most", *parts])


def headline_rows(table: Cells) -> str:
    suites = [suite for suite in plan.STEPS if any((suite, method) in table for method in plan.HEADLINE)]
    columns = [(suite, "report") for suite in suites] + [("many", "unseen")] * ("many" in suites)
    rows = [
        [
            METHODS[method].label,
            scaling(method),
            *(cell(table.get((suite, method), []), kind) for suite, kind in columns),
        ]
        for method in plan.HEADLINE
        if any((suite, method) in table for suite in suites)
    ]
    names = [suite if kind == "report" else f"{suite}, unseen instructions" for suite, kind in columns]
    return grid(["method", "alpha / r", *names], rows) if rows else ""


def differences(table: Cells) -> str:
    rows = [
        [suite, METHODS[one].label, METHODS[other].label, points(apart), apart.verdict]
        for suite, one, other, apart in all_differences(table)
    ]
    return (
        "## Differences, paired by seed\n\n" + grid(["suite", "method", "less", "points", "verdict"], rows)
        if rows
        else ""
    )


def confirmation(found: list[Record]) -> str:
    """Compare rows that were run again with other seeds with the first runs."""
    first, second = cells(found), cells(found, confirming=True)
    rows = []
    for (suite, method), again in second.items():
        if (suite, method) in first:
            rows.append([suite, METHODS[method].label, cell(first[suite, method]), cell(again)])
    lines = [grid(["suite", "method", "first seeds", "other seeds"], rows)] if rows else []
    for suite in dict.fromkeys(suite for suite, _ in second):
        for one, other in CONFIRMED:
            pair = [difference(*(by_seed(part.get((suite, m), [])) for m in (one, other))) for part in (first, second)]
            if None not in pair and pair[0].low is not None:
                inside = pair[0].low <= pair[1].mean <= pair[0].high
                lines.append(
                    f"{METHODS[one].label} less {METHODS[other].label} on {suite}: first {points(pair[0])}, again "
                    f"{points(pair[1])}: {'within' if inside else 'NOT within'} the first interval."
                )
    return "## A second time, with other seeds\n\n" + "\n\n".join(lines) if lines else ""


def everything(table: Cells) -> str:
    rows = [
        [
            suite, METHODS[method].label, scaling(method), f"{of[0].run.rate:.4g}" if scaling(method) != "–" else "–",
            str(of[0].run.steps), cell(of), cell(of, "unseen"),
        ]
        for suite in plan.STEPS for method in METHODS if (of := table.get((suite, method)))
    ]  # fmt: skip
    titles = ["suite", "method", "alpha / r", "learning rate", "steps", "accuracy", "unseen instructions"]
    return "## Every method\n\n" + grid(titles, rows)


def rates(found: list[Record]) -> str:
    choices, rows = records.choices(found), []
    for suite in plan.STEPS:
        for method in METHODS:
            tried = sorted(run for run in choices if (run.suite, run.method) == (suite, method))
            if tried:
                done = plan.chosen(suite, method, choices) is not None
                best = max(tried, key=lambda run: (choices[run], -run.rate))
                said = [
                    f"**{r.rate:.4g}: {choices[r]:.1f}**" if done and r == best else f"{r.rate:.4g}: {choices[r]:.1f}"
                    for r in tried
                ]
                rows.append([suite, METHODS[method].label, " · ".join(said)])
    note = (
        "The accuracy on the choosing pictures by learning rate, the chosen one in bold; −1 where a training diverged. "
        "A search without a bold one is not at its end.\n\n"
    )
    return "## The search for learning rates\n\n" + note + grid(["suite", "method", "rate: accuracy"], rows)


def costs(table: Cells, alone: dict[str, dict]) -> str:
    """The table of costs.

    Args:
        alone: the result of ``timing.read``.
    """
    rows = []
    for method in METHODS:
        of = table.get(("conflict8", method), [])
        of = [record.found for record in of if "step_ms" in record.found]
        if of:
            step, peak = (median(found[name] for found in of) for name in ("step_ms", "peak_bytes"))
            sizes = f"{of[0]['parameters']:,}", f"{of[0]['adapter_bytes'] / 1024:,.0f}"
            timed = alone.get(method)
            quiet = (f"{timed['step_ms']:.0f}", f"{timed['ratio']:.2f}") if timed else ("–", "–")
            rows.append([METHODS[method].label, *sizes, f"{peak / 2**20:.1f}", f"{step:.0f}", *quiet])
    note = (
        "On conflict8. The peak is what forward and backward held at once beyond model and adapter. A step's time is "
        "processor time of one thread, the median over its steps and then over seeds, while other programs shared the "
        "processor; and, where it was measured, wall time with nothing else running, the methods in turn. Layers as "
        "small as these show what an adapter costs to start rather than what it computes; benchmarks/results has large "
        "layers.\n\n"
    )
    titles = ["method", "parameters", "adapter, KiB", "peak, MiB", "step, ms", "step alone, ms", "of LoRA r 4's"]
    return "## Costs, from the same runs\n\n" + note + grid(titles, rows) if rows else ""


def mechanism(table: Cells) -> str:
    rows = []
    for suite in plan.STEPS:
        for method in METHODS:
            of = [record.found for record in table.get((suite, method), []) if "usage" in record.found]
            if not of:
                continue
            shares = [layer["most_used"] for found in of for layer in found["usage"].values()]
            worst = [max(layer["most_used"] for layer in found["usage"].values()) for found in of]
            middle = [found["flips"][len(found["flips"]) // 2]["changed"] for found in of if found["flips"]]
            last = [found["flips"][-1]["changed"] for found in of if found["flips"]]
            rows.append([
                suite, METHODS[method].label, f"{100 * mean(shares):.0f}", f"{100 * mean(worst):.0f}",
                f"{100 * mean(middle):.0f}" if middle else "–", f"{100 * mean(last):.0f}" if last else "–",
            ])  # fmt: skip
    negative = [
        [suite, METHODS[method].label, *(f"{record.found['interference']['negative'][pool]:.3f}" for pool in "AB")]
        for (suite, method), of in table.items() for record in of if "interference" in record.found
    ]  # fmt: skip
    if not rows:
        return ""
    text = (
        "## Mechanism\n\nThe share of a layer's choices that fell on its four most used factors, mean over layers and "
        "pools and in the worst of them, in percent (of 16 factors used alike it is 25; 100 is a routing that always "
        "chooses the same four); and the share of pairs that changed from one eighth of the training to the next, in "
        "its middle and at its end.\n\n"
        + grid(["suite", "method", "four most used", "in the worst layer", "changed, middle", "changed, end"], rows)
    )
    if negative:
        text += (
            "\n\nInterference (Equation 3) of up to eight instructions after the training: the mean of the negative "
            "scores off the diagonal; nearer to zero is less.\n\n"
            + grid(["suite", "method", "lora_A", "lora_B"], negative)
        )
    return text


def cell(rows: list[Record], measure: str = "report") -> str:
    found: Summary | None = summary(by_seed(rows, measure)) if rows else None
    if found is None:
        return "–"
    spread = "" if found.deviation is None else f" ± {found.deviation:.1f}"
    return f"{found.mean:.1f}{spread} ({found.seeds})"


def points(found: Difference) -> str:
    ends = "" if found.low is None else f" [{found.low:+.1f}, {found.high:+.1f}]"
    return f"{found.mean:+.1f}{ends} ({found.seeds})"


def scaling(method: str) -> str:
    return "–" if METHODS[method].scaling is None else f"{METHODS[method].scaling:g}"


def grid(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
