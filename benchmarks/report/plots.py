"""Pictures of the rows: ratios, scaling, memory, bandwidth."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from cases.implementations import IMPLEMENTATIONS
from matplotlib import pyplot

COLOURS = {name: implementation.colour for name, implementation in IMPLEMENTATIONS.items()}
LAST_PASSES = ("forward+backward", "training step", "generation")


def draw(folder: Path, rows: Sequence[dict], machine: dict) -> list[Path]:
    """Write the plots that the rows allow, named by suite, and return their paths. A row with a note is not drawn: its
    numbers must not be read without it."""
    drawn = []
    rows = [row for row in rows if not row["note"]]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    for suite in dict.fromkeys(row["suite"] for row in rows):
        figure = PLOTS.get(suite, ratios)([row for row in rows if row["suite"] == suite])
        if figure is None:
            continue
        figure.suptitle(f"{suite} on {machine['device']}")
        figure.supxlabel(f"{versions}, commit {machine['commit']}", fontsize=7, color="#6c6c6c")
        drawn.append(folder / f"{suite}.png")
        figure.savefig(drawn[-1], dpi=120)
        pyplot.close(figure)
    return drawn


def ratios(rows: Sequence[dict]):
    return bars(last_pass(rows), lambda row: row["ratio_to_base"], "time relative to the frozen layer")


def peaks(rows: Sequence[dict]):
    return bars(last_pass(rows), lambda row: row["peak_bytes"] / 2**20, "peak memory beyond inputs, MiB")


def shares(rows: Sequence[dict]):
    """Of each stage; None where no row tells it."""
    rows = [row for row in rows if row["implementation"] == "mixlora" and row["share_of_copy"] is not None]
    label = "share of a copy's bandwidth"
    return bars(rows, lambda row: row["share_of_copy"], label, ("case",), "pass") if rows else None


def last_pass(rows: Sequence[dict]) -> list[dict]:
    """The rows of each case's whole pass: the backward where there is one."""
    whole = [row for row in rows if row["pass"] in LAST_PASSES]
    return whole or list(rows)


def bars(
    rows: Sequence[dict], height: Callable[[dict], float | None], label: str,
    panel: tuple[str, ...] = ("case", "pass"), by: str = "implementation",
):  # fmt: skip
    """A panel for each case and pass with a bar for each implementation."""
    panels: dict[tuple, list[dict]] = {}
    for row in rows:
        panels.setdefault(tuple(row[name] for name in panel), []).append(row)
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 0.8 + 2.4 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, members) in zip(axes.flat, panels.items()):
        shown = [row for row in members if height(row) is not None]
        colours = [COLOURS[row["implementation"]] for row in shown]
        drawn = axis.barh([row[by] for row in shown], [height(row) for row in shown], color=colours)
        axis.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_title("\n".join(title), fontsize=9)
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
        instances = next((row["B"] for row in adapted if row["E"] != 16), 4)  # the others' number where E varies
        usual = {"E": 16, "r": 4, "tokens": max(row["tokens"] for row in ours), "B": instances}
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


PLOTS = {"stages": shares, "scaling": scaling, "memory": peaks}  # others show ratios
