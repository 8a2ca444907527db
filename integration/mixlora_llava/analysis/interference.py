"""Measure how much a training step for one task helps or harms another: Equations 2 and 3.

Each adapter is measured at its own weights, on batches of the configuration's data. The numbers are written to
``interference.json``, and the heat maps to the same folder.
"""

import random
import re
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..data.dataset import Collator, Conversations
from ..refusal import Refusal

FACTOR = re.compile(r"layers\.(\d+)\.(self_attn|mlp)\..*\blora_([AB])\b")
BLOCKS = {"self_attn": "attention", "mlp": "mlp"}


class Group(NamedTuple):
    """The parameters of one score: the factors of one pool in one block of one layer."""

    layer: int
    block: str  # "attention" or "mlp"
    pool: str  # "A" or "B"


def factor_groups(model: nn.Module) -> dict[Group, list[nn.Parameter]]:
    """The factors of a LoRA or MixLoRA adapter, by group.

    Raises:
        ValueError: the model has no such factors.
    """
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if match := FACTOR.search(name):
            groups[Group(int(match[1]), BLOCKS[match[2]], match[3])].append(parameter)
    if not groups:
        raise Refusal(f"{type(model).__name__} has no factors lora_A and lora_B in its decoder's layers")
    return dict(groups)


def task_gradients(model: nn.Module, batches: dict[str, list[dict]]) -> dict[Group, Tensor]:
    """Compute the gradient of each batch's loss by group, [tasks, batches, parameters] float32, or float64 of a float64
    model.

    It is the exact gradient of the loss for fixed routing: dropout is off, and a straight-through gate counts as the
    constant 1, because its own gradient is not that of the loss.

    Args:
        batches: the batches of each task, as the collator makes them. Each task has the same number.
    """
    groups = factor_groups(model)
    parameters = [parameter for group in groups.values() for parameter in group]
    wanted = [parameter.requires_grad for parameter in parameters]
    training = model.training
    model.eval()
    found: dict[Group, list] = {group: [] for group in groups}
    device = parameters[0].device
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with constant_gates(model):
            for task_batches in batches.values():
                rows: dict[Group, list] = {group: [] for group in groups}
                for batch in task_batches:
                    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
                    gradients = iter(torch.autograd.grad(loss, parameters))
                    for group, members in groups.items():
                        flat = [next(gradients).flatten() for _ in members]
                        rows[group].append(torch.cat(flat).to(torch.promote_types(flat[0].dtype, torch.float32)).cpu())
                for group, values in rows.items():
                    found[group].append(torch.stack(values))
    finally:
        for parameter, before in zip(parameters, wanted):
            parameter.requires_grad_(before)
        model.train(training)
    return {group: torch.stack(values) for group, values in found.items()}


@contextmanager
def constant_gates(model: nn.Module):
    """Within the block, treat the straight-through gates of a model's MixLoRA adapters as constants."""
    configs = [config for config in model.peft_config.values() if getattr(config, "gate", None) == "straight_through"]
    for config in configs:
        config.gate = "binary"
    try:
        yield
    finally:
        for config in configs:
            config.gate = "straight_through"


def loss_changes(gradients: Tensor, rate: float = 1.0) -> Tensor:
    """Equation 2 to first order: by how much a step of length ``rate`` for task j reduces task i's loss.

    Args:
        gradients: [T, K, P] of one group.

    Returns:
        [T, K, T]: for task i, its batch k and task j, the mean over the batches of j. It is nan for a task whose
        gradient is zero, because a step for this task has no direction.
    """
    T, K, P = gradients.shape
    flat = gradients.reshape(T * K, P)
    directions = flat / flat.norm(dim=1, keepdim=True)
    return rate * (flat @ directions.T).view(T, K, T, K).mean(-1)


def interference(gradients: Tensor) -> Tensor:
    """Equation 3, [T, T]: the mean of Δ_j L_i / Δ_i L_i over the batches of task i (the row). The diagonal is 1."""
    changes = loss_changes(gradients)
    own = changes.diagonal(dim1=0, dim2=2).T  # [T, K]
    return (changes / own.unsqueeze(-1)).mean(1)


def measure(model: nn.Module, batches: dict[str, list[dict]]) -> dict:
    """Compute the interference scores of all groups, and their means.

    Returns:
        ``tasks``; ``groups``, the scores [T, T] by "layer.block.pool"; ``mean``, by pool, over all layers and blocks
        (Figure 7); and ``negative``, by pool, the mean of the negative scores off the diagonal, or 0 without any.
    """
    gradients = task_gradients(model, batches)
    scores = {group: interference(values) for group, values in gradients.items()}
    mean = {
        pool: torch.stack([score for group, score in scores.items() if group.pool == pool]).mean(0) for pool in "AB"
    }
    return {
        "tasks": list(batches),
        "groups": {f"{group.layer}.{group.block}.{group.pool}": score.tolist() for group, score in scores.items()},
        "mean": {pool: score.tolist() for pool, score in mean.items()},
        "negative": {
            pool: sum(negative) / len(negative) if (negative := score[score < 0].tolist()) else 0.0
            for pool, score in mean.items()
        },
    }


def sample_batches(
    data: Conversations, collator: Collator, tasks: list[str], count: int, size: int, seed: int = 0
) -> dict[str, list[dict]]:
    """Draw ``count`` batches of ``size`` records of each task, without repetition.

    Raises:
        ValueError: a task has too few records.
    """
    source, batches = random.Random(seed), {}
    for task in tasks:
        members = [index for index, record in enumerate(data.records) if record.task == task]
        if len(members) < count * size:
            raise Refusal(f"{task} has {len(members)} records, {count} batches of {size} need {count * size}")
        drawn = source.sample(members, count * size)
        batches[task] = [
            collator([data[index] for index in drawn[start : start + size]]) for start in range(0, len(drawn), size)
        ]
    return batches


def plot(results: dict[str, dict], file: str | Path, key: str | None = None) -> None:
    """Draw heat maps as in Figures 2 and 7: task i in rows, task j in columns, blue if j harms i.

    All panels have the same scale. It ends at the 95th percentile of the scores off the diagonal, so that one outlier
    does not hide the other scores. Larger scores have the scale's last colour.

    Args:
        results: the results of ``measure``, by the adapter's name.
        key: "layer.block" for one block of a layer; None for the mean over all.
    """
    scores = {
        (name, pool): torch.tensor(result["mean"][pool] if key is None else result["groups"][f"{key}.{pool}"])
        for name, result in results.items()
        for pool in "AB"
    }
    limit = colour_limit(list(scores.values()))
    figure = Figure(figsize=(4.2 * 2, 3.8 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 2, squeeze=False)
    for panel, ((name, pool), score) in zip(panels.flat, scores.items()):
        tasks = results[name]["tasks"]
        image = panel.imshow(score, cmap="coolwarm", vmin=-limit, vmax=limit)
        panel.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=7)
        panel.set_yticks(range(len(tasks)), tasks, fontsize=7)
        panel.set_xlabel("task j, whose step it is", fontsize=8)
        panel.set_ylabel("task i, whose loss it is", fontsize=8)
        panel.set_title(f"{name}: lora_{pool}" + (f", layer {key}" if key else ""), fontsize=9)
        for (i, j), value in np.ndenumerate(score.numpy()):
            dark = i == j or abs(value) > 0.7 * limit
            panel.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color="white" if dark else "black")
    figure.colorbar(image, ax=panels, shrink=0.6, extend="both", label="red helps, blue harms")
    figure.savefig(file, dpi=120)


def colour_limit(scores: list[Tensor]) -> float:
    """The end of the heat maps' scale: the 95th percentile of the absolute scores off the diagonals."""
    sizes = torch.cat([score[~torch.eye(len(score), dtype=torch.bool)].abs() for score in scores])
    sizes = sizes[sizes.isfinite()]  # a task without a gradient has no scores
    return max(torch.quantile(sizes, 0.95).item(), 1e-6) if len(sizes) else 1.0
