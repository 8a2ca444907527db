"""Pictures of the rows: ratios, scaling, memory."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from implementations import NAMES
from matplotlib import pyplot

COLOURS = dict(zip(NAMES, ("#8c8c8c", "#e07b39", "#f2b684", "#5b8db8", "#a7c4dc", "#b5446e", "#2e8b57")))
LAST_PASSES = ("forward+backward", "training step", "generation")


def draw(folder: Path, rows: Sequence[dict], device: str) -> list[Path]:
    """Write the plots that the rows allow, named by suite, and return their paths."""
    drawn = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        chosen = [row for row in rows if row["suite"] == suite]
        if suite == "scaling":
            figure = scaling(chosen)
        elif suite == "memory":
            figure = bars(last_pass(chosen), lambda row: row["peak_bytes"] / 2**20, "peak memory beyond inputs, MiB")
        else:
            figure = bars(last_pass(chosen), lambda row: row["ratio_to_base"], "time relative to the frozen layer")
        figure.suptitle(f"{suite} on {device}")
        drawn.append(folder / f"{suite}.png")
        figure.savefig(drawn[-1], dpi=120)
        pyplot.close(figure)
    return drawn


def last_pass(rows: Sequence[dict]) -> list[dict]:
    """The rows of each case's whole pass: the backward where there is one."""
    whole = [row for row in rows if row["pass"] in LAST_PASSES]
    return whole or list(rows)


def bars(rows: Sequence[dict], height, label: str):
    """A panel for each case with a bar for each implementation."""
    cases = list(dict.fromkeys((row["case"], row["pass"]) for row in rows))
    columns = min(len(cases), 3)
    lines = -(-len(cases) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 0.8 + 2.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, (case, which) in zip(axes.flat, cases):
        shown = [row for row in rows if (row["case"], row["pass"]) == (case, which) and height(row) is not None]
        names = [row["implementation"] for row in shown]
        drawn = axis.barh(names, [height(row) for row in shown], color=[COLOURS[name] for name in names])
        axis.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_title(f"{case}\n{which}", fontsize=9)
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def scaling(rows: Sequence[dict]):
    """Time against E, r, tokens and instances, the others at their usual values."""
    rows = [row for row in rows if row["pass"] == "forward+backward"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = pyplot.subplots(
        len(dtypes), 4, figsize=(15, 0.8 + 3 * len(dtypes)), squeeze=False, layout="constrained"
    )
    for line, dtype in zip(axes, dtypes):
        ours = [row | {"tokens": row["B"] * row["L"]} for row in rows if row["dtype"] == dtype]
        adapted = [row for row in ours if row["implementation"] == "mixlora"]
        frozen = [row for row in ours if row["implementation"] == "base"]
        usual = {"E": 16, "r": 4, "tokens": max(row["tokens"] for row in ours), "B": 4}
        for axis, (name, title) in zip(
            line, {"E": "factors E", "r": "r", "tokens": "tokens", "B": "instances"}.items()
        ):
            points = [row for row in adapted if all(row[k] == v for k, v in usual.items() if k != name)]
            _line(axis, points, name, "mixlora")
            if name == "tokens":
                _line(axis, frozen, name, "base")
            else:
                level = next(row["median_ms"] for row in frozen if row["tokens"] == usual["tokens"])
                axis.axhline(level, color=COLOURS["base"], linestyle="--", label="base")
            axis.set_ylim(bottom=0)
            axis.set_xlabel(title, fontsize=9)
            axis.set_ylabel(f"forward+backward, ms ({dtype})", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].legend(frameon=False, fontsize=8)
    return figure


def _line(axis, points: Sequence[dict], name: str, label: str) -> None:
    points = sorted(points, key=lambda row: row[name])
    axis.plot([row[name] for row in points], [row["median_ms"] for row in points], "o-", color=COLOURS[label],
              label=label)  # fmt: skip
    axis.set_xticks([row[name] for row in points])
