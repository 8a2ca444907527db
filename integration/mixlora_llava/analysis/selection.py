"""Record which factors were chosen for each instance, and plot whether instances of a task have similar choices.

It writes the choices (``selection.npz``), how often each factor was chosen for each task (``usage.json`` and a
histogram), and t-SNE maps with the Jaccard metric as in Figures 5 and 6 (``tsne.json`` and a picture).
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import nn

from ..refusal import Refusal
from .prompts import forward_prompts

LAYER = re.compile(r"layers\.(\d+)\.(self_attn|mlp)\.(\w+)$")
BLOCKS = {"attention": "self_attn", "mlp": "mlp"}


class Selections(NamedTuple):
    """The factors chosen for N instances.

    Attributes:
        tasks: the task of each instance, [N].
        chosen: the chosen factors [N, r] int64, most probable first, by the layer's name and the pool ("A" or "B").
        num_factors: E.
    """

    tasks: list[str]
    chosen: dict[tuple[str, str], np.ndarray]
    num_factors: int

    def multi_hot(self, layer: int, block: str, pool: str) -> np.ndarray:
        """[N, modules * E] bool: whether each factor of each linear layer of a block was chosen.

        Raises:
            KeyError: the model has no such layer or block.
        """
        names = [key for key in self.chosen if key[1] == pool and self._place(key[0]) == (layer, BLOCKS[block])]
        if not names:
            raise KeyError(f"no MixLoRA layers in {block} of layer {layer}")
        hot = np.zeros((len(names), len(self.tasks), self.num_factors), bool)
        for number, name in enumerate(sorted(names)):
            np.put_along_axis(hot[number], self.chosen[name], True, axis=1)
        return hot.transpose(1, 0, 2).reshape(len(self.tasks), -1)

    @property
    def layers(self) -> list[int]:
        """The decoder's adapted layers, in order."""
        return sorted({self._place(name)[0] for name, _ in self.chosen})

    @property
    def pools(self) -> str:
        """The pools to plot: "A" if all of B's choices equal A's, else "AB"."""
        tied = all(np.array_equal(self.chosen[name, "B"], index) for (name, _), index in self.chosen.items())
        return "A" if tied else "AB"

    def usage(self) -> dict[str, dict[str, list[int]]]:
        """The number of instances that chose each factor, [E], by "layer's name.pool" and task."""
        tasks = np.array(self.tasks)
        return {
            f"{name}.{pool}": {
                task: np.bincount(index[tasks == task].ravel(), minlength=self.num_factors).tolist()
                for task in dict.fromkeys(self.tasks)
            }
            for (name, pool), index in self.chosen.items()
        }

    @staticmethod
    def _place(name: str) -> tuple[int, str]:
        match = LAYER.search(name)
        return int(match[1]), match[2]


def check_layers(model: nn.Module, layers: list[int]) -> None:
    """Check that an adapter has layers of these numbers, before questions are routed.

    Raises:
        ValueError: it does not. The message has the numbers of its layers.
    """
    names = [name for name, module in model.named_modules() if hasattr(module, "mixlora_adapter")]
    known = sorted({int(match[1]) for match in map(LAYER.search, names) if match})
    if unknown := [layer for layer in layers if layer not in known]:
        raise Refusal(f"the adapter has the layers {_listed(known)}, got {_listed(unknown)}")


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def record(
    model: nn.Module, processor, questions: dict[str, list[dict]], images: str | Path, *, template: str = "v1",
    batch_size: int = 8, embeddings: dict[str, torch.Tensor] | None = None,
) -> Selections:  # fmt: skip
    """Record the routing of each question's prompt, without its answer; see ``forward_prompts``."""
    tasks, parts, factors = [], {}, 0
    for task, count, routings in forward_prompts(
        model, processor, questions, images, template=template, batch_size=batch_size, embeddings=embeddings
    ):
        for name, routing in routings.items():
            for pool, index in (("A", routing.index_a), ("B", routing.index_b)):
                parts.setdefault((name, pool), []).append(index.cpu().numpy())
            factors = routing.probs_a.shape[1]
        tasks += [task] * count
    return Selections(tasks, {key: np.concatenate(value) for key, value in parts.items()}, factors)


def embed(selections: Selections, layer: int, block: str = "mlp", pool: str = "A", seed: int = 0) -> dict:
    """t-SNE of the choices in a layer with the Jaccard metric, perplexity 30 and learning rate 200.

    Returns:
        ``points`` [N, 2]; ``silhouette``, from -1 to 1, how well the Jaccard distance separates the tasks (None if all
        instances have the same choices); ``layer``, ``block``, ``pool``.
    """
    hot = selections.multi_hot(layer, block, pool)
    perplexity = min(30, (len(hot) - 1) / 3)  # t-SNE allows at most this for fewer than about 90 instances
    tsne = TSNE(perplexity=perplexity, learning_rate=200, metric="jaccard", init="random", random_state=seed)
    apart = len(set(selections.tasks)) > 1 and (hot != hot[0]).any()
    score = float(silhouette_score(hot, selections.tasks, metric="jaccard")) if apart else None
    points = tsne.fit_transform(hot).tolist()
    return {"points": points, "silhouette": score, "layer": layer, "block": block, "pool": pool}


def plot_maps(selections: Selections, maps: list[dict], file: str | Path) -> None:
    """Draw scatter plots, with a colour for each task."""
    figure = Figure(figsize=(3.6 * len(maps), 4.2), layout="constrained")
    tasks = list(dict.fromkeys(selections.tasks))
    colours = colormaps["tab10" if len(tasks) <= 10 else "tab20"]
    for panel, found in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps):
        points = np.array(found["points"])
        for number, task in enumerate(tasks):
            members = np.array(selections.tasks) == task
            panel.scatter(*points[members].T, s=8, alpha=0.6, color=colours(number), label=task)
        panel.set_title(f"layer {found['layer']}, {found['block']}, lora_{found['pool']}", fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(tasks)), fontsize=7)
    figure.savefig(file, dpi=120)


def plot_usage(selections: Selections, file: str | Path, module: str) -> None:
    """Draw histograms of the chosen factors in one kind of linear layer, with a row for each decoder layer and bars by
    task."""
    layers, tasks, pools = selections.layers, list(dict.fromkeys(selections.tasks)), selections.pools
    figure = Figure(figsize=(4.5 * len(pools), 1.6 * len(layers) + 1), layout="constrained")
    panels = figure.subplots(len(layers), len(pools), squeeze=False, sharey=True)
    factors, colours = np.arange(selections.num_factors), colormaps["tab10" if len(tasks) <= 10 else "tab20"]
    for key, counts in selections.usage().items():
        name, _, pool = key.rpartition(".")
        if not name.endswith(module) or pool not in pools:
            continue
        panel = panels[layers.index(Selections._place(name)[0])][pools.index(pool)]
        bottom = np.zeros(selections.num_factors)
        for number, task in enumerate(tasks):
            panel.bar(factors, counts[task], bottom=bottom, color=colours(number), label=task)
            bottom += counts[task]
        panel.set_title(f"{name.partition('layers.')[2]}, lora_{pool}", fontsize=8)
        panel.set_xlabel("factor", fontsize=8)
        panel.set_ylabel("times chosen", fontsize=8)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=7)
    figure.savefig(file, dpi=120)


def write(selections: Selections, folder: str | Path, layers: list[int] | None = None, seed: int = 0) -> dict:
    """Write numbers and pictures, and return the silhouettes by "layer.block.pool".

    Args:
        layers: the layers of the maps; by default the first, the middle and the last, as in the released code.
    """
    folder, all_layers = Path(folder), selections.layers
    folder.mkdir(parents=True, exist_ok=True)
    layers = layers or sorted({all_layers[0], all_layers[(len(all_layers) - 1) // 2], all_layers[-1]})
    arrays = {f"{name}.{pool}": index for (name, pool), index in selections.chosen.items()}
    np.savez_compressed(folder / "selection.npz", tasks=np.array(selections.tasks), **arrays)
    (folder / "usage.json").write_text(json.dumps(selections.usage()), encoding="utf-8")
    maps = [embed(selections, layer, "mlp", pool, seed) for pool in selections.pools for layer in layers]
    (folder / "tsne.json").write_text(json.dumps(maps), encoding="utf-8")
    plot_maps(selections, maps, folder / "tsne.png")
    plot_usage(selections, folder / "usage.png", "mlp.down_proj")
    return {f"{found['layer']}.{found['block']}.{found['pool']}": found["silhouette"] for found in maps}
