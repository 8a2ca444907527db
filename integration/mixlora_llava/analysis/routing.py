"""Measure how an adapter routes questions: the figures of ``routing_report`` over all questions."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mixlora_kernels.peft import routing_report
from mixlora_kernels.peft.report import COLLAPSED

from .prompts import forward_prompts

# Ignore ``routing_report``'s warning about each batch, because all questions count together.
QUIET = "the routing of adapter .* has collapsed"


def measure(
    model: nn.Module, processor, questions: dict[str, list[dict]], images: str | Path, *, template: str = "v1",
    batch_size: int = 8, embeddings: dict[str, Tensor] | None = None,
) -> dict:  # fmt: skip
    """Route the prompt of each question, without its answer.

    Returns:
        ``questions``, their number by task; ``num_factors`` and ``r``; and ``layers``. For each "layer's name.pool",
        ``layers`` has ``usage`` [E], the number of questions that chose each factor; ``most_used``, the part of all
        choices that fell on the r most used factors; ``unused``, the number of factors that no question chose;
        ``entropy``, of the router's probabilities in nats, and ``near_ties``, both means over the questions, see
        ``routing_report``. If pairs are tied, only pool A is listed.

    Raises:
        ValueError: the model has no MixLoRA layers.
    """
    total: dict[str, dict] = {}
    seen, tied, r = 0, True, 0
    for _, count, routings in forward_prompts(
        model, processor, questions, images, template=template, batch_size=batch_size, embeddings=embeddings
    ):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=QUIET)
            report = routing_report(model)
        for key, figures in _figures(report):
            found = total.setdefault(key, dict.fromkeys(figures, 0))
            found["usage"] = found["usage"] + np.array(figures["usage"])
            for name in ("entropy", "near_ties"):
                found[name] += figures[name] * count
        seen += count
        tied = tied and all(torch.equal(routing.index_a, routing.index_b) for routing in routings.values())
        r = next(iter(routings.values())).index_a.shape[1]
    layers = {
        key: {
            "usage": found["usage"].tolist(),
            "most_used": float(np.sort(found["usage"])[-r:].sum() / found["usage"].sum()),
            "unused": int((found["usage"] == 0).sum()),
            "entropy": found["entropy"] / seen,
            "near_ties": found["near_ties"] / seen,
        }
        for key, found in total.items()
        if not (tied and key.endswith(".B"))  # tied pairs have the same figures in both pools
    }
    num_factors = len(next(iter(layers.values()))["usage"])
    counts = {task: len(rows) for task, rows in questions.items()}
    return {"questions": counts, "num_factors": num_factors, "r": r, "layers": layers}


def _figures(report: dict[str, dict[str, dict]]) -> Iterator[tuple[str, dict]]:
    """The figures of the active adapters, by layer and pool."""
    for layers in report.values():
        for name, row in layers.items():
            for pool in "ab":
                yield f"{name}.{pool.upper()}", {key: row[f"{key}_{pool}"] for key in ("usage", "entropy", "near_ties")}


def collapsed(found: dict) -> list[str]:
    """The layers and pools of ``measure`` with r < E in which nearly all choices fall on the same r factors."""
    if found["r"] == found["num_factors"]:
        return []
    return [key for key, row in found["layers"].items() if row["most_used"] >= COLLAPSED]


def describe(found: dict) -> str:
    """The figures of ``measure`` as text for the terminal."""
    E, r, layers = found["num_factors"], found["r"], found["layers"]
    width = max(map(len, layers))
    lines = [
        f"{sum(found['questions'].values())} questions of {len(found['questions'])} tasks, {r} of {E} factors chosen",
        f"{'layer and pool':{width}}  most used {r}  unused  entropy  near-ties",
        *(
            f"{key:{width}}  {row['most_used']:>{10 + len(str(r))}.1%}  {row['unused']:>6}  {row['entropy']:>7.2f}  "
            f"{row['near_ties']:>9.1%}"
            for key, row in layers.items()
        ),
        f"even choices would be {r / E:.1%} on the {r} factors chosen most, and an entropy of {np.log(E):.2f}",
    ]
    if names := collapsed(found):
        lines.append(
            f"collapsed: {len(names)} of {len(layers)} put at least {COLLAPSED:.0%} of their choices on the same {r} "
            f"factors, as plain LoRA does: {', '.join(names)}"
        )
    return "\n".join(lines)


def plot(found: dict, file: str | Path) -> None:
    """Draw how often each factor was chosen, with a row for each layer and pool. The scale ends at the number of
    questions."""
    from matplotlib.figure import Figure

    layers, total = found["layers"], sum(found["questions"].values())
    figure = Figure(figsize=(3 + 0.25 * found["num_factors"], 1.5 + 0.2 * len(layers)), layout="constrained")
    panel = figure.subplots()
    shares = np.array([row["usage"] for row in layers.values()]) / total
    image = panel.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    panel.set_yticks(range(len(layers)), layers, fontsize=6)
    panel.set_xlabel("factor")
    figure.colorbar(image, ax=panel, label="share of the questions that chose it")
    figure.savefig(file, dpi=120)
