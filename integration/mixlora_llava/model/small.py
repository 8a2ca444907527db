"""A LLaVA so small that it can be trained from scratch in a minute. All classes are transformers' own."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ..data.conversation import IMAGE

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", IMAGE]


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word and punctuation mark in the texts."""
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(SPECIAL + words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=[IMAGE], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_processor(texts: list[str], *, image: int, patch: int) -> LlavaProcessor:
    """A processor with the words of the texts, and for images of that side, which it resizes to; both in pixels."""
    size = {"height": image, "width": image}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer=word_tokenizer(texts), patch_size=patch, vision_feature_select_strategy="default",
        image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip


def make_llava(text: dict, vision: dict, *, seed: int | None = None, **settings) -> LlavaForConditionalGeneration:
    """Make a LLaVA of Llama and CLIP with random weights, for tests, benchmarks and the example.

    Args:
        text, vision: fields of ``LlamaConfig`` and of ``CLIPVisionConfig``.
        seed: the seed of the weights; None: use torch's generator in its current state.
        settings: further fields of ``LlavaConfig``.
    """
    if seed is not None:
        torch.manual_seed(seed)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), **settings)
    return LlavaForConditionalGeneration(config)


def small_llava(
    texts: list[str], *, image: int = 16, patch: int = 8, width: int = 96, layers: int = 2, seed: int = 0,
    vision_width: int | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:  # fmt: skip
    """Make a LLaVA with random weights, and its processor.

    Args:
        texts: the texts whose words its tokenizer has to know.
        image, patch: the side of an image and of a patch, in pixels.
        width: the width of the text decoder's hidden states.
        layers: the number of the text decoder's layers.
        vision_width: the width of the vision tower's hidden states, by default two thirds of ``width``.
    """
    processor = make_processor(texts, image=image, patch=patch)
    tokenizer = processor.tokenizer
    vision_width = vision_width or width * 2 // 3
    vision = {
        "hidden_size": vision_width, "intermediate_size": 2 * vision_width, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": image, "patch_size": patch, "projection_dim": vision_width,
    }  # fmt: skip
    text = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "vocab_size": len(tokenizer), "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    model = make_llava(
        text, vision, seed=seed, image_token_id=SPECIAL.index(IMAGE), pad_token_id=0, vision_feature_layer=-1
    )
    return model, processor


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: str | Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
