"""What was measured, for people (tables, Markdown) and for programs (JSON)."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

COLUMNS = {
    "case": "case",
    "implementation": "implementation",
    "pass": "pass",
    "median_ms": "median ms",
    "p20_ms": "p20",
    "p80_ms": "p80",
    "ratio_to_base": "/ base",
    "ratio_to_peft_lora": "/ peft_lora",
    "ratio_to_published": "/ published",
    "bytes": "MB",
    "share_of_copy": "/ copy's bandwidth",
    "bytes_per_second": "TB/s",
    "operations_per_second": "TFLOP/s",
    "peak_bytes": "peak MiB",
    "launches": "launches",
    "error": "error",
    "rounds": "rounds",
}


ALWAYS = ("case", "implementation", "pass", "median_ms", "p20_ms", "p80_ms", "rounds")


def columns(rows: Sequence[dict]) -> dict[str, str]:
    """Those of which the rows tell something."""
    return {
        name: head for name, head in COLUMNS.items() if name in ALWAYS or any(row[name] is not None for row in rows)
    }


def cells(row: dict, names: Iterable[str]) -> list[str]:
    """One row's columns as text."""
    form = {"peak_bytes": lambda value: f"{value / 2**20:.2f}", "error": "{:.1e}".format, "rounds": str}
    form |= {"bytes": lambda value: f"{value / 1e6:.1f}", "share_of_copy": "{:.1%}".format}
    form |= {name: lambda value: f"{value / 1e12:.2f}" for name in COLUMNS if name.endswith("per_second")}
    form |= {name: "{:.3f}".format for name in COLUMNS if name.startswith("ratio")}
    form |= {name: milliseconds for name in COLUMNS if name.endswith("_ms")}
    return ["–" if row[name] is None else form.get(name, str)(row[name]) for name in names]


def milliseconds(value: float) -> str:
    """With at least three digits that count."""
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def table(rows: Sequence[dict]) -> str:
    """An aligned table; a case is named once."""
    shown = columns(rows)
    lines = [list(shown.values())]
    for number, row in enumerate(rows):
        line = cells(row, shown)
        if number and rows[number - 1]["case"] == row["case"]:
            line[0] = ""
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines)]
    words = 3  # the first columns are words and begin on the left
    return "\n".join(
        "  ".join(c.ljust(w) if n < words else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def notes(rows: Sequence[dict]) -> list[str]:
    """What must be said of some of the rows, each once."""
    found = dict.fromkeys((row["note"], row["case"]) for row in rows if row["note"])
    return [f"{case}: {note}." for note, case in found]


def summary_table(bars: Iterable[dict]) -> str:
    """The bars as aligned lines."""
    lines = [["claim", "measured", "bar", "met"]]
    lines += [[bar["claim"], bar["measured_text"], bar["bar_text"], verdict(bar)] for bar in bars]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def judge(bar: dict) -> dict:
    """The bar with whether it is met, and its numbers as text."""
    at_least, form = bar.pop("at_least"), bar.pop("form")
    met = bar["measured"] >= bar["bar"] if at_least else bar["measured"] <= bar["bar"]
    texts = {"measured_text": form.format(bar["measured"])}
    texts["bar_text"] = ("≥ " if at_least else "≤ ") + form.format(bar["bar"])
    return bar | {"met": bool(met)} | texts


def bar(claim: str, measured: float, limit: float, form: str = "{:.3f}", at_least: bool = False) -> dict:
    return {"claim": claim, "measured": measured, "bar": limit, "form": form, "at_least": at_least}


def verdict(bar: dict) -> str:
    return {True: "yes", False: "no", None: "–"}[bar["met"]]


def write_json(
    path: Path, machine: dict, arguments: dict, bars: Sequence[dict], rows: Sequence[dict], failures: Sequence[str]
) -> None:
    """All of it, a row a line."""
    head = {"machine": machine, "arguments": arguments, "summary": list(bars), "failures": list(failures)}
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    path.write_text(f'{text},\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


GENERAL = """\
Times are medians over rounds in which every implementation runs once, in an order drawn anew; on a GPU they are the \
device's, which the host runs ahead of. A ratio is the median over rounds of the two times' ratio within the round, \
not the ratio of the medians. The backward alone is what forward and backward take beyond the forward. Peak memory \
is what is held beyond the inputs and parameters, output and gradients included. Launches are kernels, copies and \
fillings. The error is the largest deviation from a float64 reference relative to the largest element of the tensor, \
over the output and (with the backward) all gradients; with dropout, it is that of the same layer without."""

OF_SUITES = {
    "stages": """\
A stage's bytes are the activations it reads and writes, and nothing else. Its share is that of a plain copy's bytes \
a second, in the same round.""",
    "decoder": """\
A LLaMA's decoder through `get_peft_model`, given hidden states that require a gradient, with a loss; on one thread of \
a CPU. `mixlora` computes layers that read the same x together, `mixlora_single` each by itself; `mixlora_tied` is the \
preset `tied()`.""",
    "decode": """\
The routing is kept. On a GPU a step is the replay of a CUDA graph. "A layer of n" is the mean of n projections, all \
of several blocks, run one after another.""",
    "model": """\
The error is taken in float32: over the logits and all gradients, and for a generation as the share of tokens that \
differ.""",
    "training": """\
The text decoder, given hidden states that require a gradient, as LLaVA's projector gives it; random weights, shared \
by the implementations; `mixlora` and `peft_lora` through `get_peft_model`. The vision tower is left out: it costs \
all the same. A step is forward, loss, backward and AdamW. Peak memory is beyond the frozen model: activations, \
adapters, their gradients and the optimizer's state. The error is that of a model of two layers of the same widths \
in float32.""",
}


def write_markdown(
    path: Path, machine: dict, bars: Sequence[dict], rows: Sequence[dict], failures: Sequence[str],
    plots: Sequence[Path], command: str,
) -> None:  # fmt: skip
    """The same for a reader: conditions, bars, a table for each suite, the plots."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# Benchmark on {machine['device']}",
        "",
        f"`{command}`, {machine['date']}, commit {machine['commit']}. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads; Python {machine['python']}, {versions}.",
        "",
        GENERAL,
        "",
    ]
    if failures:
        lines += ["Not measured, because it failed:", "", *(f"- {failure}" for failure in failures), ""]
    if bars:
        told = [[bar["claim"], bar["measured_text"], bar["bar_text"], verdict(bar)] for bar in bars]
        lines += markdown_table(["claim", "measured", "bar", "met"], told)
    for suite in dict.fromkeys(row["suite"] for row in rows):
        own = [row for row in rows if row["suite"] == suite]
        shown = columns(own)
        lines += [f"## {suite}", ""]
        lines += [f"{text}\n" for text in (OF_SUITES.get(suite), *notes(own)) if text]
        lines += [f"![{plot.stem}]({plot.name})\n" for plot in plots if plot.stem == suite]
        lines += markdown_table(list(shown.values()), [cells(row, shown) for row in own])
    path.write_text("\n".join(lines), encoding="utf-8")


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)] + [""]
