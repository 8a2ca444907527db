"""Write the report of ``example``: its pictures, and its text in Markdown."""

import json
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from mixlora_kernels.peft import ConditionalMixLoRAConfig

from . import digits


def plot_losses(losses: dict[str, dict[int, float]], file: Path, window: int = 20) -> None:
    """Plot the loss of each step, and its mean over the last ``window`` steps.

    A batch has records of similar length, and therefore of few tasks. Single losses vary between easy and hard tasks.
    """
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    panel = figure.subplots()
    for name, loss in losses.items():
        steps, values = list(loss), list(loss.values())
        means = [sum(values[max(0, n - window) : n]) / min(n, window) for n in range(1, len(values) + 1)]
        line = panel.plot(steps, means, label=f"{name}, mean of {window}", linewidth=1.6)[0]
        panel.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.6)
    panel.set(xlabel="step", ylabel="loss on the answers", yscale="log")
    panel.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def plot_samples(folder: Path, names: list[str], file: Path) -> None:
    """Draw the first held-out question of each task, with its image and the answers of each model."""
    figure = Figure(figsize=(8, 8), layout="compressed")
    for panel, task in zip(figure.subplots(2, 3).flat, digits.TASKS):
        rows = {name: _first(folder / "predictions" / name / f"{task}.jsonl") for name in names}
        row = rows[names[0]]
        panel.imshow(Image.open(row["image_path"]))
        said = "\n".join(f"{name}: {found['predict'] or '(nothing)'}" for name, found in rows.items())
        panel.set_title(_wrapped(row["metadata"]["question"]), fontsize=8)
        panel.set_xlabel(f"answer: {row['target']}\n{said}", fontsize=8)
        panel.set(xticks=[], yticks=[])
    figure.savefig(file, dpi=120)


def _first(file: Path) -> dict:
    with file.open(encoding="utf-8") as stream:
        return json.loads(stream.readline())


def _wrapped(text: str, width: int = 34) -> str:
    lines = [""]
    for word in text.split():
        lines[-1:] = [f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < width else [lines[-1], word]
    return "\n".join(lines)


def report(figures: dict, margin: float) -> str:
    """The report in Markdown.

    Args:
        figures: the result of ``example.run``.
        margin: by how many points MixLoRA's accuracy must exceed that of the untuned model.
    """
    names, resumed, accuracy = list(figures["accuracy"]), figures["resumed"], figures["accuracy"]
    first, last = figures["loss"]["mixlora"]
    gain = accuracy["mixlora"] - accuracy["untuned"]
    return f"""# MixLoRA on a small LLaVA: visual instructions about handwritten digits

A LLaVA of two decoder layers, trained from nothing on captions of images and on questions about captions in words, is
tuned on six tasks of visual instructions: with MixLoRA, E=16 tied pairs of factors, of which r=4 are chosen for each
question with its image and weighted by a normalized gate, and with LoRA. The digits that it is asked about were never
trained on.

**MixLoRA answers {accuracy["mixlora"]:.1f} % right, the untuned model {accuracy["untuned"]:.1f} %:
{gain:.1f} points more ({margin:.0f} are needed).** Its loss fell from {first:.3f} to {last:.3f}, and a run that was
killed and resumed ended with {"the same" if resumed["identical"] else "OTHER"} weights.

## Accuracy

In percent; an answer is right when it is the exact words.

{_table(figures, names)}

{_comparison(figures)} The doubt is what {figures["questions"]} questions of each task leave; another seed adds to it,
and the learning rates were not searched here. When MixLoRA is better than LoRA, by how much and with which settings, is
what the study measures, with seeds and intervals; its report is in the repository,
`integration/mixlora_llava/study/results/report.md`, and `mixlora study` repeats it.

![The first question of every task](samples.png)

## Training

Loss, mean of the first and the last ten steps: {_losses(figures["loss"])}. MixLoRA's contains its load-balancing loss
with the weight {ConditionalMixLoRAConfig.tied().balance}; where all factors are used alike, this adds about as much.

![loss](loss.png)

A run of {resumed["steps"]} steps was killed with SIGKILL after checkpoint {resumed["killed_after"]}, resumed, and
compared bit for bit with one that was left alone: {resumed["tensors"]} tensors,
{"all identical" if resumed["identical"] else "NOT identical"}.

## Interference between tasks

What a step for task j (column) does to the loss of task i (row), relative to a step for i itself (Equation 3), over all
layers: blue harms. Mean of the negative scores: {_negative(figures["interference"])}. By layer and block:
`interference.json`.

![interference](interference.png)

## Factors chosen

Each point is a held-out question; t-SNE puts those that chose the same factors together. The silhouette says how far
the tasks are apart by the Jaccard distance itself: 1, each task has its own factors; 0 and below, tasks share them.
{_silhouettes(figures["silhouettes"])}. Numbers: `selection/selection.npz`, `usage.json`, `tsne.json`.

![t-SNE](selection/tsne.png)

How often each factor was chosen, in one linear layer of each block:

![usage](selection/usage.png)

{figures["minutes"]:.1f} minutes, of which {figures["cpu_minutes"]:.1f} of computing in one thread.
"""


def _table(figures: dict, names: list[str]) -> str:
    rows = [
        f"| {task} | "
        + " | ".join(f"{figures['tasks'][name][task]:.1f}" for name in names) + " |"
        for task in digits.TASKS
    ]  # fmt: skip
    mean = " | ".join(f"**{figures['accuracy'][name]:.1f}** ± {figures['error'][name]:.1f}" for name in names)
    counts = " | ".join(f"{figures['parameters'].get(name, 0):,}" for name in names)
    head = [f"| task | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return "\n".join([*head, *rows, f"| **mean of the six tasks** | {mean} |", f"| adapter's parameters | {counts} |"])


def _comparison(figures: dict) -> str:
    """Compare MixLoRA with each LoRA in words that depend on the numbers."""
    accuracy, error, said = figures["accuracy"], figures["error"], []
    for name in (name for name in figures["parameters"] if name != "mixlora"):
        difference = accuracy["mixlora"] - accuracy[name]
        doubt = 2 * (error["mixlora"] ** 2 + error[name] ** 2) ** 0.5
        verdict = "above" if difference > doubt else "below" if difference < -doubt else "not clearly apart from"
        said.append(f"{verdict} {name} ({difference:+.1f}, in doubt by {doubt:.1f})")
    return (
        f"MixLoRA is {' and '.join(said)}. lora_r4 has as many factors at work for a question as MixLoRA, and lora_r24 "
        "about as many parameters."
    )


def _losses(losses: dict) -> str:
    return "; ".join(f"{name} {first:.3f} to {last:.3f}" for name, (first, last) in losses.items())


def _negative(interference: dict) -> str:
    return "; ".join(
        f"{name}, lora_A {value['A']:.3f}, lora_B {value['B']:.3f}" for name, value in interference.items()
    )


def _silhouettes(silhouettes: dict) -> str:
    places = {key: key.split(".") for key in silhouettes}
    return ", ".join(
        f"layer {layer} {block} lora_{pool} "
        + ("all chose alike" if silhouettes[key] is None else format(silhouettes[key], ".2f"))
        for key, (layer, block, pool) in places.items()
    )
