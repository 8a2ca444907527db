"""Task embeddings for ``routing="task"``: Equation 10 with LLaVA's own language model as the encoder (Appendix B)."""

import json
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
