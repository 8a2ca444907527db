"""Real photographs with questions, and a small LLaVA with random weights for them; nothing is downloaded."""

from typing import NamedTuple

import torch
from sklearn.datasets import load_sample_images
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mixlora_llava.model.small import make_llava, make_processor

PATCH = 14  # pixels, as CLIP ViT-L/14's
PROMPT = "USER : <image> {question} ASSISTANT :"

# For each photograph (a Chinese temple, a dahlia) two questions with answers, all of one length in words.
CONVERSATIONS = (
    (
        ("what is on the hill ?", "a temple with curved roofs"),
        ("what colours do you see ?", "green grey and some red"),
    ),
    (
        ("what is in the picture ?", "one flower in full bloom"),
        ("what colour are the petals ?", "orange with a pink edge"),
    ),
)


class Conversations(NamedTuple):
    """Instances of equal length, so that there is no padding.

    Attributes:
        training: the model's keyword arguments with ``labels``; only the answers' tokens count.
        prompts: the same without answers, to generate from.
    """

    training: dict[str, torch.Tensor]
    prompts: dict[str, torch.Tensor]


def build_processor(pixels: int) -> LlavaProcessor:
    """Resizes to pixels × pixels and knows the words of the conversations."""
    texts = [PROMPT, *(text for pairs in CONVERSATIONS for pair in pairs for text in pair)]
    return make_processor(texts, image=pixels, patch=PATCH)


def read_conversations(processor: LlavaProcessor, device: torch.device) -> Conversations:
    images, prompts, texts = [], [], []
    for photograph, pairs in zip(load_sample_images().images, CONVERSATIONS):
        for question, answer in pairs:
            images.append(photograph)
            prompts.append(PROMPT.format(question=question))
            texts.append(f"{prompts[-1]} {answer} </s>")
    prompted, answered = (
        processor(images=images, text=text, return_tensors="pt").to(device) for text in (prompts, texts)
    )
    labels = answered["input_ids"].clone()
    labels[:, : prompted["input_ids"].shape[1]] = -100
    return Conversations({**answered, "labels": labels}, dict(prompted))


def build_model(
    processor: LlavaProcessor, pixels: int, hidden: int, layers: int, device: torch.device, seed: int
) -> LlavaForConditionalGeneration:
    """Random weights in float32; the decoder's widths in Llama-7B's proportions."""
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": hidden * 43 // 16,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, **ids,
    }  # fmt: skip
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": pixels, "patch_size": PATCH,
    }  # fmt: skip
    return make_llava(text, vision, seed=seed, image_token_id=processor.image_token_id, **ids).to(device)
