"""A small LLaVA with random weights, and real photographs with questions for it; nothing is downloaded."""

from typing import NamedTuple

import torch
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

PATCH = 14  # pixels, as CLIP ViT-L/14's
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")

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
    words = f"USER ASSISTANT : {CONVERSATIONS}".translate(str.maketrans("(),'", "    ")).split()
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def read_conversations(processor: LlavaProcessor, device: torch.device) -> Conversations:
    images, prompts, answers = [], [], []
    for photograph, pairs in zip(load_sample_images().images, CONVERSATIONS):
        for question, answer in pairs:
            images.append(photograph)
            prompts.append(f"<s> USER : <image> {question} ASSISTANT :")
            answers.append(f" {answer} </s>")
    prompted = processor(images=images, text=prompts, return_tensors="pt").to(device)
    answered = processor(images=images, text=[p + a for p, a in zip(prompts, answers)], return_tensors="pt").to(device)
    labels = answered["input_ids"].clone()
    labels[:, : prompted["input_ids"].shape[1]] = -100
    return Conversations({**answered, "labels": labels}, dict(prompted))


def build_model(
    processor: LlavaProcessor, pixels: int, hidden: int, layers: int, device: torch.device
) -> LlavaForConditionalGeneration:
    """Random weights in float32, from torch's generator; the decoder's widths in Llama-7B's proportions."""
    tokenizer = processor.tokenizer
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, **ids,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, image_size=pixels,
        patch_size=PATCH,
    )  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, **ids)
    return LlavaForConditionalGeneration(config).to(device)
