"""What was measured, for people (tables, Markdown) and for programs (JSON)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def milliseconds(value: float) -> str:
    """With at least three digits that count."""
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


def tera(value: float) -> str:
    return f"{value / 1e12:.2f}"


COLUMNS = {  # of a row: what stands above it, and how it is written
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
ALWAYS = ("case", "implementation", "pass", "median_ms", "p20_ms", "p80_ms", "rounds")
WORDS = 3  # the first columns are words and begin on the left


def columns(rows: Sequence[dict]) -> dict[str, str]:
    """Those of which the rows tell something, with what stands above them."""
    return {
        name: head
        for name, (head, _) in COLUMNS.items()
        if name in ALWAYS or any(row[name] is not None for row in rows)
    }


def cells(row: dict, names: Iterable[str]) -> list[str]:
    """One row's columns as text."""
    return ["–" if row[name] is None else COLUMNS[name][1](row[name]) for name in names]


def table(rows: Sequence[dict]) -> str:
    """An aligned table; a case is named once."""
    shown = columns(rows)
    lines = [list(shown.values())]
    for number, row in enumerate(rows):
        line = cells(row, shown)
        if number and rows[number - 1]["case"] == row["case"]:
            line[0] = ""
        lines.append(line)
    return align(lines, words=WORDS)


def align(lines: Sequence[Sequence[str]], words: int) -> str:
    """Columns of one width, the first ``words`` of them from the left, the others from the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(c.ljust(w) if n < words else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def notes(rows: Sequence[dict]) -> list[str]:
    """What must be said of some of the rows, each once."""
    found = dict.fromkeys((row["note"], row["case"]) for row in rows if row["note"])
    return [f"{case}: {note}." for note, case in found]


BARS = ["claim", "measured", "bar", "met"]


def told(bar: dict) -> list[str]:
    met = {True: "yes", False: "no", None: "–"}[bar["met"]]
    return [bar["claim"], bar["measured_text"], bar["bar_text"], met]


def summary_table(bars: Iterable[dict]) -> str:
    """The bars as aligned lines."""
    return align([BARS, *map(told, bars)], words=len(BARS))


def judge(bar: dict) -> dict:
    """The bar with whether it is met, and its numbers as text."""
    at_least, form = bar.pop("at_least"), bar.pop("form")
    met = bar["measured"] >= bar["bar"] if at_least else bar["measured"] <= bar["bar"]
    texts = {"measured_text": form.format(bar["measured"])}
    texts["bar_text"] = ("≥ " if at_least else "≤ ") + form.format(bar["bar"])
    return bar | {"met": bool(met)} | texts


def bar(claim: str, measured: float, limit: float, form: str = "{:.3f}", at_least: bool = False) -> dict:
    return {"claim": claim, "measured": measured, "bar": limit, "form": form, "at_least": at_least}


def write_json(
    path: Path, machine: dict, arguments: dict, bars: Sequence[dict], rows: Sequence[dict],
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
    lines = [
        f"# Benchmark on {machine['device']}",
        "",
        f"`{command}`, {machine['date']}, commit {machine['commit']}. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads; Python {machine['python']}, {versions}.",
        "",
        GENERAL,
        "",
    ]
    for what, items in (("Not measured, because it failed:", failures), ("Left out:", left_out)):
        if items:
            lines += [what, "", *(f"- {item}" for item in items), ""]
    if bars:
        lines += markdown_table(BARS, map(told, bars))
    for suite in dict.fromkeys(row["suite"] for row in rows):
        own = [row for row in rows if row["suite"] == suite]
        shown = columns(own)
        lines += [f"## {suite}", ""]
        lines += [f"{text}\n" for text in (abouts.get(suite), *notes(own)) if text]
        lines += [f"![{plot.stem}]({plot.name})\n" for plot in plots if plot.stem == suite]
        lines += markdown_table(list(shown.values()), [cells(row, shown) for row in own])
    path.write_text("\n".join(lines), encoding="utf-8")


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)] + [""]
