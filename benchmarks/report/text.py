"""What was measured, for people (tables, Markdown) and for programs (JSON)."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path


def milliseconds(value: float) -> str:
    """With at least three digits that count."""
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def tera(value: float) -> str:
    return f"{value / 1e12:.2f}"


Columns = Mapping[str, tuple[str, Callable]]  # of a row: what stands above it, and how it is written

COLUMNS: Columns = {
    "case": ("case", str),
    "implementation": ("implementation", str),
    "pass": ("pass", str),
    "median_ms": ("median ms", milliseconds),
    "p20_ms": ("p20", milliseconds),
    "p80_ms": ("p80", milliseconds),
    "ratio_to_base": ("/ base", "{:.3f}".format),
    "ratio_to_peft_lora": ("/ peft_lora", "{:.3f}".format),
    "ratio_to_published": ("/ published", "{:.3f}".format),
    "bytes": ("MB", lambda value: f"{value / 1e6:.1f}"),
    "share_of_copy": ("/ copy's bandwidth", "{:.1%}".format),
    "bytes_per_second": ("TB/s", tera),
    "operations_per_second": ("TFLOP/s", tera),
    "peak_bytes": ("peak MiB", lambda value: f"{value / 2**20:.2f}"),
    "launches": ("launches", str),
    "error": ("error", "{:.1e}".format),
    "rounds": ("rounds", str),
}
BARS: Columns = {
    "claim": ("claim", str),
    "measured_text": ("measured", str),
    "bar_text": ("bar", str),
    "met": ("met", {True: "yes", False: "no"}.get),
}


def table(rows: Sequence[dict], columns: Columns = COLUMNS) -> str:
    """An aligned Markdown table of the columns of which the rows tell something; words begin on the left."""
    columns = {name: column for name, column in columns.items() if any(row[name] is not None for row in rows)}
    lines = [[head for head, _ in columns.values()]]
    lines += [["–" if row[name] is None else write(row[name]) for name, (_, write) in columns.items()] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    sides = ["<" if any(isinstance(row[name], str) for row in rows) else ">" for name in columns]
    lines.insert(1, ["-" * (width - 1) + ("-" if side == "<" else ":") for width, side in zip(widths, sides)])
    return "\n".join(
        f"| {' | '.join(f'{cell:{side}{width}}' for cell, side, width in zip(line, sides, widths))} |" for line in lines
    )


def notes(rows: Sequence[dict]) -> list[str]:
    """What must be said of some of the rows, each once."""
    found = dict.fromkeys((row["note"], row["case"]) for row in rows if row["note"])
    return [f"{case}: {note}." for note, case in found]


def bar(claim: str, measured: float, limit: float, form: str = "{:.3f}", at_least: bool = False) -> dict:
    """A claim, and whether what was measured meets it; its numbers also as text."""
    met = measured >= limit if at_least else measured <= limit
    texts = {"measured_text": form.format(measured), "bar_text": ("≥ " if at_least else "≤ ") + form.format(limit)}
    return {"claim": claim, "measured": measured, "bar": limit, "met": bool(met)} | texts


def write_json(
    path: Path, machine: dict, arguments: dict, bars: Iterable[dict], rows: Iterable[dict],
    failures: Sequence[str] = (), left_out: Sequence[dict] = (),
) -> None:  # fmt: skip
    """All of it, a row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"machine": machine, "arguments": arguments, "summary": list(bars)}
    head |= {"failures": list(failures), "left_out": list(left_out)}
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


def write_markdown(
    path: Path, machine: dict, bars: Sequence[dict], rows: Sequence[dict], failures: Sequence[str],
    left_out: Sequence[str], plots: Sequence[Path], command: str, abouts: Mapping[str, str | None],
) -> None:  # fmt: skip
    """The same for a reader: conditions, bars, a table for each suite, the plots; ``abouts`` says of suites what their
    rows must be read with."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        f"# Benchmark on {machine['device']}",
        f"`{command}`, {machine['date']}, commit {machine['commit']}. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads; Python {machine['python']}, {versions}.",
        GENERAL,
    ]
    for what, items in (("Not measured, because it failed:", failures), ("Left out:", left_out)):
        if items:
            parts += [what, "\n".join(f"- {item}" for item in items)]
    if bars:
        parts.append(table(bars, BARS))
    for suite in dict.fromkeys(row["suite"] for row in rows):
        own = [row for row in rows if row["suite"] == suite]
        parts += [f"## {suite}", *filter(None, (abouts.get(suite), *notes(own)))]
        parts += [f"![{plot.stem}]({plot.name})" for plot in plots if plot.stem == suite] + [table(own)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
