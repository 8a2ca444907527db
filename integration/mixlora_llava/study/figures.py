"""Draw the report's pictures from the raw results."""

from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ..analysis import interference, selection
from . import plan, records
from .methods import METHODS
from .records import Record

Cells = dict[tuple[str, str], list[Record]]
# the methods whose losses and interference are drawn
COMPARED = ("lora_r4", "lora_r16", "lora_r24_scaling8", "paper", "tied_normalized", "tied_text_balanced")


def draw(folder: Path, found: list[Record], table: Cells) -> dict[str, str]:
    """Draw all pictures for which there are results. Return their titles by file."""
    made = {
        "accuracy.png": ("Accuracy on the reporting pictures; a point is a seed.", accuracies(table)),
        "rates.png": ("Accuracy on the choosing pictures by learning rate, seed 0.", rates(found)),
        "loss.png": (
            "Loss while training, with the load-balancing loss where there is one; means over tenths and seeds.",
            losses(table),
        ),
        "flips.png": ("Pairs that changed since the look before, over the training.", flips(table)),
        "usage.png": (
            "How often each factor of a layer was chosen, of all its choices; conflict8, one seed.",
            usage(table),
        ),
    }
    drawn = {}
    for name, (title, figure) in made.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=110)
            drawn[name] = title
    for suite in plan.STEPS:
        if heat := heat_maps(table, suite):
            interference.plot(heat, folder / f"interference_{suite}.png")
            drawn[f"interference_{suite}.png"] = f"Interference between instructions of {suite} (Figures 2 and 7)."
    for method in ("paper", "tied_text_balanced"):
        if maps := selections(table, "many", method):
            name = f"tsne_{method}.png"
            choice_map(maps).savefig(folder / name, dpi=110)
            drawn[name] = f"{METHODS[method].label} on many: questions that chose alike lie together (Figures 5 and 6)."
    return drawn


def accuracies(table: Cells) -> Figure | None:
    """Draw a panel for each suite, with a bar for each method and a point for each seed."""
    suites = [suite for suite in plan.STEPS if any(place[0] == suite for place in table)]
    if not suites:
        return None
    most = max(sum(place[0] == suite for place in table) for suite in suites)
    figure = Figure(figsize=(5.2 * len(suites), 1.2 + 0.26 * most), layout="constrained")
    for panel, suite in zip(figure.subplots(1, len(suites), squeeze=False)[0], suites):
        names = [method for method in METHODS if (suite, method) in table]
        for place, method in enumerate(names):
            values = [record.found["accuracy"]["report"] for record in table[suite, method]]
            panel.barh(place, mean(values), color=colour(method), alpha=0.55)
            panel.plot(values, [place] * len(values), "k.", markersize=4)
        panel.set_yticks(range(len(names)), [METHODS[method].label for method in names], fontsize=7)
        panel.invert_yaxis()
        panel.set_title(suite, fontsize=9)
        panel.set_xlabel("accuracy, %", fontsize=8)
    return figure


def colour(method: str) -> str:
    if METHODS[method].kind == "untuned":
        return "tab:gray"
    if METHODS[method].kind == "lora":
        return "tab:orange"
    return "tab:green" if method.startswith("tied_") else "tab:blue"


def rates(found: list[Record]) -> Figure | None:
    choices = records.choices(found)
    suites = [suite for suite in plan.STEPS if any(run.suite == suite for run in choices)]
    if not suites:
        return None
    figure = Figure(figsize=(4 * len(suites) + 3, 3.4), layout="constrained")
    for panel, suite in zip(figure.subplots(1, len(suites), squeeze=False)[0], suites):
        tried = sorted({run.rate for run in choices if run.suite == suite and run.method in plan.HEADLINE})
        for number, method in enumerate(plan.HEADLINE):
            runs = sorted(run for run in choices if (run.suite, run.method) == (suite, method))
            if not runs:
                continue
            values = [choices[run] for run in runs]
            panel.plot(
                [run.rate for run in runs], values, "o-", color=colormaps["tab20"](number), label=METHODS[method].label
            )
        panel.set(xscale="log", xlabel="learning rate", title=suite)
        panel.set_xticks(tried, [f"{rate:.4g}" for rate in tried], rotation=45, fontsize=7)
        panel.minorticks_off()
    figure.axes[0].set_ylabel("accuracy, %")
    handles = {label: handle for panel in figure.axes for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=7)
    return figure


def losses(table: Cells) -> Figure | None:
    suites = [suite for suite in plan.STEPS if any((suite, method) in table for method in COMPARED)]
    if not suites:
        return None
    figure = Figure(figsize=(4 * len(suites), 3.2), layout="constrained")
    for panel, suite in zip(figure.subplots(1, len(suites), squeeze=False)[0], suites):
        for number, method in enumerate(COMPARED):
            if runs := [record.found["loss"] for record in table.get((suite, method), [])]:
                panel.plot(np.mean([run[:10] for run in runs], axis=0), color=f"C{number}", label=METHODS[method].label)
        panel.set(xlabel="tenth of the training", title=suite, yscale="log")
    figure.axes[0].set_ylabel("loss")
    figure.axes[0].legend(fontsize=7)
    return figure


def flips(table: Cells) -> Figure | None:
    rows = {
        method: [[look["changed"] for look in record.found["flips"]] for record in table.get(("conflict8", method), [])]
        for method in METHODS if METHODS[method].kind == "mixlora" and METHODS[method].longer == 1
    }  # fmt: skip
    rows = {method: runs for method, runs in rows.items() if runs and method not in ("random", "fixed")}
    if not rows:
        return None
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    panel = figure.subplots()
    for method, runs in rows.items():
        looks = np.mean(runs, axis=0) * 100
        panel.plot(range(2, len(looks) + 2), looks, "o-", markersize=3, label=METHODS[method].label)
    panel.set(xlabel="eighth of the training", ylabel="pairs changed, %", title="conflict8")
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def usage(table: Cells) -> Figure | None:
    """Draw which part of the choices fell on each factor: a panel for each method, a row for each layer and pool."""
    shown = {}
    for method in ("paper", "normalized", "tied", "tied_normalized", "tied_text_balanced"):
        if rows := table.get(("conflict8", method)):
            shown[method] = min(rows, key=lambda record: record.run.seed).found["usage"]
    if not shown:
        return None
    figure = Figure(figsize=(3.4 * len(shown) + 2, 5.4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, (method, layers) in zip(panels, shown.items()):
        width = max(len(layer["counts"]) for layer in layers.values())
        shares = np.zeros((len(layers), width))
        for row, layer in zip(shares, layers.values()):
            row[: len(layer["counts"])] = np.array(layer["counts"]) / sum(layer["counts"])
        image = panel.imshow(shares, aspect="auto", vmin=0, vmax=0.25, interpolation="nearest")
        panel.set_title(METHODS[method].label, fontsize=8)
        panel.set_xlabel("factor", fontsize=8)
        panel.set_yticks([])
    names = [name.partition("layers.")[2] for name in next(iter(shown.values()))]
    panels[0].set_yticks(range(len(names)), names, fontsize=5)
    figure.colorbar(image, ax=panels, shrink=0.7, label="share of the choices; 1/4: always chosen")
    return figure


def heat_maps(table: Cells, suite: str) -> dict[str, dict]:
    found = {}
    for method in COMPARED:
        for record in table.get((suite, method), []):
            if "interference" in record.found:
                found.setdefault(METHODS[method].label, record.found["interference"])
    return found


def selections(table: Cells, suite: str, method: str) -> tuple[selection.Selections, list[str]] | None:
    """The recorded choices of one seed, with the family of each instruction, and whether it was unseen in training."""
    for record in table.get((suite, method), []):
        if kept := record.found.get("choices"):
            chosen = {
                (name, pool): np.array(index)
                for name, both in kept["chosen"].items() for pool, index in zip("AB", both)
            }  # fmt: skip
            factors = 1 + max(int(index.max()) for index in chosen.values())
            return selection.Selections(kept["tasks"], chosen, factors), kept["unseen"]
    return None


def choice_map(found: tuple[selection.Selections, list[str]]) -> Figure:
    """Draw t-SNE maps of the choices in each layer's MLP: a colour for each family, crosses for unseen instructions."""
    selections, unseen = found
    families = [task.rpartition("_")[0] or task for task in selections.tasks]
    kinds = list(dict.fromkeys(families))
    new = np.array([task in unseen for task in selections.tasks])
    layers = selections.layers
    figure = Figure(figsize=(4.4 * len(layers), 4.6), layout="constrained")
    for panel, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers):
        points = np.array(selection.embed(selections, layer)["points"])
        for number, kind in enumerate(kinds):
            members = np.array(families) == kind
            for mask, marker in ((members & ~new, "o"), (members & new, "x")):
                label = kind if marker == "o" else None
                panel.scatter(*points[mask].T, s=14, marker=marker, color=colormaps["tab10"](number), label=label)
        panel.set(title=f"layer {layer}, mlp, lora_A", xticks=[], yticks=[])
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle("crosses: instructions that were never trained on", fontsize=8)
    return figure
