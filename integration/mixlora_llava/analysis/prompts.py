"""Run questions through a model as prompts, without answers, to look at their routing."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from mixlora_kernels import Routing
from mixlora_kernels.peft import task_embedding
from mixlora_kernels.peft.side_information import SideInformation, find_side_information

from ..data.images import find_image, load_image
from ..model.generate import build_prompt
from ..model.task_embeddings import of_tasks
from ..refusal import Refusal


def routing_side(model: nn.Module) -> SideInformation:
    """The side information that a model's MixLoRA layers share. Its ``last`` has each layer's routing in the last
    forward.

    Raises:
        Refusal: the model has no MixLoRA layers.
    """
    try:
        return find_side_information(model)
    except ValueError as error:
        raise Refusal(f"the adapter does not route: {error}") from error


@torch.inference_mode()
def forward_prompts(
    model: nn.Module, processor, questions: dict[str, list[dict]], images: str | Path, *, template: str,
    batch_size: int, embeddings: dict[str, Tensor] | None = None,
) -> Iterator[tuple[str, int, dict[str, Routing]]]:  # fmt: skip
    """Run the prompts of all questions, one task after the other.

    Args:
        questions: the questions of each task; see ``scoring.predict.read_questions``.
        images: the folder that their ``image_path`` is relative to.
        embeddings: the embedding of each task, for an adapter with task routing.

    Yields:
        For each batch its task, its number of questions, and the routing of each layer, by the layer's name.

    Raises:
        ValueError: the model has no MixLoRA layers, a task has no embedding, or an image cannot be used.
    """
    side, first = routing_side(model), next(model.parameters())
    embedding = of_tasks(model, embeddings, questions)
    processor.tokenizer.padding_side = "right"
    for task, rows in questions.items():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            prompts = [build_prompt(row["prompt"], template) for row in batch]
            pictures = [load_image(find_image(images, row["image_path"])) for row in batch]
            inputs = processor(text=prompts, images=pictures, padding=True, return_tensors="pt").to(first.device)
            inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
            inputs["pixel_values"] = inputs["pixel_values"].to(first.dtype)
            told = nullcontext()
            if (known := embedding[task]) is not None:
                told = task_embedding(model, known.to(first.device).expand(len(batch), -1))
            with told:
                model(**inputs, use_cache=False)
            yield task, len(batch), {name: routing for (name, _), routing in side.last.items()}
