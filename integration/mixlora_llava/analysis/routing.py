"""How an adapter routes given questions: the figures of ``routing_report``, added up over all of them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mixlora_kernels.peft import routing_report

from .prompts import forward_prompts

COLLAPSED = 0.95  # share of the choices on the r factors chosen most, from which a pool is called collapsed


def measure(
    model: nn.Module, processor, questions: dict[str, list[dict]], images: str | Path, *, template: str = "v1",
    batch_size: int = 8, embeddings: dict[str, Tensor] | None = None,
) -> dict:  # fmt: skip
    """Route each question's prompt, before any answer.

    Returns:
        ``questions``, their number by task; ``num_factors`` and ``r``; and ``layers``: by "layer's name.pool" the
        ``usage`` [E], how many questions chose each factor; ``most_used``, the share of all choices that fell on the r
        factors chosen most; ``unused``, the number of factors that no question chose; ``entropy``, of the router's
        probabilities in nats, and ``near_ties``, both means over the questions, see ``routing_report``. Where B takes
        A's choices throughout, pool A alone.

    Raises:
        ValueError: the model has no MixLoRA layers.
    """
    total: dict[str, dict] = {}
    seen, tied, r = 0, True, 0
    for _, count, routings in forward_prompts(
        model, processor, questions, images, template=template, batch_size=batch_size, embeddings=embeddings
    ):
        for key, figures in _figures(routing_report(model)):
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
        if not (tied and key.endswith(".B"))  # it would say the same again
    }
    num_factors = len(next(iter(layers.values()))["usage"])
    counts = {task: len(rows) for task, rows in questions.items()}
    return {"questions": counts, "num_factors": num_factors, "r": r, "layers": layers}


def _figures(report: dict[str, dict[str, dict]]) -> Iterator[tuple[str, dict]]:
    """By layer and pool, of the adapters that are at work."""
    for layers in report.values():
        for name, row in layers.items():
            for pool in "ab":
                yield f"{name}.{pool.upper()}", {key: row[f"{key}_{pool}"] for key in ("usage", "entropy", "near_ties")}


def collapsed(found: dict) -> list[str]:
    """The layers and pools of ``measure`` whose choices nearly all fall on the same r factors, where r < E."""
    if found["r"] == found["num_factors"]:
        return []
    return [key for key, row in found["layers"].items() if row["most_used"] >= COLLAPSED]


def describe(found: dict) -> str:
    """``measure``'s figures as a text for the terminal."""
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
    """How often each factor was chosen, a row for every layer and pool, on one scale from 0 to every question."""
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
