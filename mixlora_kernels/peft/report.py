"""Report the routing of the last forward: which factors were chosen, and how close the choices were."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..routing import Routing
from .side_information import find_side_information
from .targets import left_alone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEAR = 2**-7  # the relative rounding error of bfloat16: a choice by a smaller margin may differ there

COLLAPSED = 0.95  # part of all choices that falls on only r factors, from which on routing counts as collapsed
ENOUGH = 16  # instances, below which equal choices mean little


class RoutingReport(dict):
    """The result of ``routing_report``, by adapter and layer. ``left_alone`` has the experts that are not adapted, by
    name, each with a description."""

    left_alone: dict[str, str]


def routing_report(model: nn.Module, near: float = NEAR) -> RoutingReport:
    """Report how each adapter routed the last forward, for each layer.

    Args:
        model: an adapted model.
        near: a choice is a near-tie if the probability of the last chosen factor exceeds that of the first factor that
            was not chosen by at most this part of it.

    Warns of layers whose routing has collapsed: over at least 16 instances, 95 % of all choices fell on only r factors.
    Nearly every instance then has the same factors, and the layer is a plain LoRA of rank r.

    Returns:
        A dictionary by adapter and layer. Each entry has ``instances``, their number, and for pool A:
        ``usage_a`` [E], the number of instances that chose each factor;
        ``most_used_a``, the part of all choices that fell on the r most used factors (1 if all instances chose the same
        factors, r / E if all factors were chosen equally often);
        ``near_ties_a``, the part of instances whose choice was a near-tie;
        ``entropy_a``, the mean entropy of the probabilities in nats (at most ln E).
        The entries ``_b`` are those of pool B. The attribute ``left_alone`` names the experts of a mixture of experts
        that are not adapted.

    Raises:
        ValueError: the model has no MixLoRA layers, or has not run a forward yet.
    """
    last = find_side_information(model).last
    if not last:
        raise ValueError("nothing to report: the adapted model has not run a forward yet")
    report = RoutingReport()
    report.left_alone = left_alone(model.get_base_model() if isinstance(model, PeftModel) else model)
    for (key, adapter), routing in last.items():
        report.setdefault(adapter, {})[key] = _summary(routing, near)
    for adapter, layers in report.items():
        _warn_of_collapse(adapter, layers)
    return report


def _warn_of_collapse(adapter: str, layers: dict[str, dict]) -> None:
    collapsed = [
        f"{key} (pool {pool.upper()})"
        for key, row in layers.items()
        for pool in ("a", "b")
        if row["instances"] >= ENOUGH and row[f"most_used_{pool}"] >= COLLAPSED and chooses(row, pool)
    ]
    if collapsed:
        shown = ", ".join(collapsed[:3]) + (f" and {len(collapsed) - 3} more" if len(collapsed) > 3 else "")
        warnings.warn(
            f"the routing of adapter {adapter!r} has collapsed in {shown}: nearly all instances chose the same "
            "factors, and the adapter is a plain LoRA of rank r there. If the instances are of different tasks, train "
            "with a load-balancing loss (balance=0.3), and see whether LoRA is as good",
            stacklevel=3,
        )


def chooses(row: dict, pool: str) -> bool:
    """Whether the pool has more than r factors."""
    usage = row[f"usage_{pool}"]
    return sum(usage) < row["instances"] * len(usage)


def _summary(routing: Routing, near: float) -> dict:
    summary: dict[str, Any] = {"instances": routing.index_a.shape[0]}
    for pool, index, probs in (
        ("a", routing.index_a, routing.probs_a),
        ("b", routing.index_b, routing.probs_b),
    ):
        E, r = probs.shape[1], index.shape[1]
        usage = torch.bincount(index.flatten(), minlength=E)
        summary[f"usage_{pool}"] = usage.tolist()
        summary[f"most_used_{pool}"] = (usage.topk(r)[0].sum() / usage.sum()).item()
        summary[f"near_ties_{pool}"] = _near_ties(probs, r, near)
        distribution = probs / probs.sum(-1, keepdim=True)  # p_B is the sum of two distributions
        summary[f"entropy_{pool}"] = torch.special.entr(distribution).sum(-1).mean().item()
    return summary


def _near_ties(probs: Tensor, r: int, near: float) -> float:
    if r == probs.shape[1]:
        return 0.0  # every factor is chosen
    ordered = probs.sort(-1, descending=True)[0]
    return (ordered[:, r - 1] - ordered[:, r] <= near * ordered[:, r - 1]).float().mean().item()


def plot_routing(report: dict[str, dict[str, dict]], adapter: str = "default") -> "Figure":
    """Draw how many of the instances chose each factor, for each layer. Pool A and pool B have one panel each.

    Returns the matplotlib figure.

    Raises:
        KeyError: the report has no such adapter.
    """
    from matplotlib.figure import Figure

    layers = report[adapter]
    figure = Figure(figsize=(9, 1.5 + 0.16 * len(layers)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, pool in zip(panels, ("a", "b")):
        usage = [[count / row["instances"] for count in row[f"usage_{pool}"]] for row in layers.values()]
        image = panel.imshow(usage, aspect="auto", vmin=0, vmax=1, interpolation="nearest")
        panel.set(title=f"pool {pool.upper()}", xlabel="factor")
    panels[0].set_yticks(range(len(layers)), layers, fontsize=6)
    figure.colorbar(image, ax=panels, label="share of instances")
    return figure
