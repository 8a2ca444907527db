"""Generate answers to questions about images, in batches."""

from contextlib import nullcontext

import torch
from PIL import Image
from torch import Tensor, nn

from mixlora_kernels.peft import task_embedding

from ..data.conversation import TEMPLATES, prompt


def build_prompt(question: str, template: str, image: bool = True) -> str:
    """The text that the model continues. Vision-Flan's ``[Options]`` becomes ``Options``, as in the released code."""
    return prompt(question, TEMPLATES[template], image).replace("[Options]", "Options")


@torch.inference_mode()
def answer(
    model: nn.Module,
    processor,
    prompts: list[str],
    images: list[Image.Image] | None,
    *,
    max_new_tokens: int = 64,
    embedding: Tensor | None = None,
    **options,
) -> list[str]:
    """Generate the answers of a batch, padded on the left. Decoding is greedy unless ``options`` change it.

    Args:
        prompts, images: one image for each prompt (see ``build_prompt``), or None for prompts without images.
        embedding: [d_task] or [B, d_task], for an adapter with ``routing="task"``.
        options: further arguments of ``generate``.
    """
    device = next(model.parameters()).device
    tokenizer, side = processor.tokenizer, processor.tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        batch = processor(text=prompts, images=images, padding=True, return_tensors="pt")
    finally:
        tokenizer.padding_side = side
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "token_type_ids"}
    if images is not None:
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, "max_new_tokens": max_new_tokens} | options
    context = nullcontext()
    if embedding is not None:
        rows = embedding.to(device).expand(len(prompts), -1) if embedding.dim() == 1 else embedding.to(device)
        context = task_embedding(model, rows)
    with context:
        out = model.generate(**inputs, **options)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
