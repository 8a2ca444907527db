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
    "peak_bytes": "peak MiB",
    "error": "error",
    "rounds": "rounds",
}


def cells(row: dict) -> list[str]:
    """One row's columns as text."""
    form = {"peak_bytes": lambda value: f"{value / 2**20:.2f}", "error": "{:.1e}".format, "rounds": str}
    form |= {name: "{:.3f}".format for name in COLUMNS if name.startswith("ratio")}
    form |= {name: "{:.2f}".format for name in COLUMNS if name.endswith("_ms")}
    return ["–" if row[name] is None else form.get(name, str)(row[name]) for name in COLUMNS]


def table(rows: Sequence[dict]) -> str:
    """An aligned table; a case is named once."""
    lines = [list(COLUMNS.values())]
    for number, row in enumerate(rows):
        line = cells(row)
        if number and rows[number - 1]["case"] == row["case"]:
            line[0] = ""
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines)]
    words = 3  # the first columns are words and begin on the left
    return "\n".join(
        "  ".join(c.ljust(w) if n < words else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def summary_table(bars: Iterable[dict]) -> str:
    """The bars as aligned lines."""
    lines = [["claim", "measured", "bar", "met"]]
    lines += [[bar["claim"], bar["measured_text"], bar["bar_text"], verdict(bar)] for bar in bars]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def verdict(bar: dict) -> str:
    return {True: "yes", False: "no", None: "–"}[bar["met"]]


def write_json(path: Path, machine: dict, arguments: dict, bars: Sequence[dict], rows: Sequence[dict]) -> None:
    """All of it, a row a line."""
    head = {"machine": machine, "arguments": arguments, "summary": list(bars)}
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    path.write_text(f'{text},\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def write_markdown(
    path: Path, machine: dict, bars: Sequence[dict], rows: Sequence[dict], plots: Sequence[Path], command: str
) -> None:
    """The same for a reader: conditions, bars, a table for each suite, the plots."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# Benchmark on {machine['device']}",
        "",
        f"`{command}`, {machine['date']}, commit {machine['commit']}. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads; Python {machine['python']}, {versions}.",
        "",
        "Times are medians over rounds in which every implementation runs once, in an order drawn anew. A ratio is the "
        "median over rounds of the two times' ratio within the round, not the ratio of the medians. Peak memory is "
        "what is held beyond the inputs and parameters, output and gradients included. The error is the largest "
        "deviation from a float64 reference relative to the largest element of the tensor, over the output and (with "
        "the backward) all gradients; with dropout, it is that of the same layer without. In the suite model it is "
        "taken in float32: over the logits and all gradients, and for a generation as the share of tokens that differ.",
        "",
    ]
    if bars:
        told = [[bar["claim"], bar["measured_text"], bar["bar_text"], verdict(bar)] for bar in bars]
        lines += markdown_table(["claim", "measured", "bar", "met"], told)
    for suite in dict.fromkeys(row["suite"] for row in rows):
        lines += [f"## {suite}", ""]
        lines += [f"![{plot.stem}]({plot.name})\n" for plot in plots if plot.stem.startswith(suite)]
        lines += markdown_table(list(COLUMNS.values()), [cells(row) for row in rows if row["suite"] == suite])
    path.write_text("\n".join(lines), encoding="utf-8")


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)] + [""]
