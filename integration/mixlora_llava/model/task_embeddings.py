"""Task embeddings for ``routing="task"``: Equation 10 with LLaVA's own language model as the encoder (Appendix B)."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..refusal import Refusal


def read_definitions(file: str | Path, tasks: list[str]) -> dict[str, str]:
    """Read the definition of each task.

    Raises:
        ValueError: the file is not a JSON object, or lacks a task.
    """
    try:
        definitions = json.loads(Path(file).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{file} is not JSON: {error}") from error
    if not isinstance(definitions, dict):
        raise Refusal(f"{file} must hold an object of a text per task, got {type(definitions).__name__}")
    if missing := [task for task in tasks if not isinstance(definitions.get(task), str)]:
        raise Refusal(f"{file} has no definition of the tasks {missing}")
    return {task: definitions[task] for task in tasks}


def routes_by_task(model: nn.Module) -> bool:
    """Whether a model has an adapter whose routers read the task's embedding."""
    configs = getattr(model, "peft_config", {}).values()
    return any(getattr(config, "routing", None) == "task" for config in configs)


def of_tasks(
    model: nn.Module,
    embeddings: dict[str, Tensor] | None,
    tasks: Iterable[str],
    remedy: str = "leave their questions out",
) -> dict[str, Tensor | None]:
    """The embedding that a model needs for each task, or None for each if it does not route by task.

    Raises:
        ValueError: a task has no embedding. The message ends with the remedy.
    """
    tasks = list(tasks)
    if not routes_by_task(model):
        return dict.fromkeys(tasks)
    known = embeddings or {}
    if missing := [task for task in tasks if task not in known]:
        there = f", only of {', '.join(known)}" if known else ""
        raise Refusal(f"there is no embedding of the tasks {', '.join(missing)}{there}: {remedy}")
    return {task: known[task] for task in tasks}


@torch.no_grad()
def embed_tasks(model: nn.Module, tokenizer, definitions: dict[str, str]) -> dict[str, Tensor]:
    """Compute the embedding of each definition: the mean of the decoder's last hidden states over its tokens, [d_text]
    float32.

    Call it before the model is patched, because the pretrained model is the encoder.
    """
    decoder = model.get_decoder()
    device = next(decoder.parameters()).device
    return {
        task: decoder(input_ids=tokenizer(text, return_tensors="pt").input_ids.to(device))
        .last_hidden_state[0]
        .float()
        .mean(0)
        .cpu()
        for task, text in definitions.items()
    }
