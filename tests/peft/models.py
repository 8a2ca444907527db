"""Tiny models built from their configurations, one of each family, and what to feed them."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import peft
import pytest
import torch
import transformers as hf
from packaging.version import Version
from peft import get_peft_model
from torch import nn

from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_llava.model.small import make_llava

# transformers' own add_adapter and load_adapter refuse any method of an older peft, plain LoRA as well.
TRANSFORMERS_LOADS = Version(hf.__version__) < Version("5.24") or Version(peft.__version__) >= Version("0.22")
needs_transformers_adapters = pytest.mark.skipif(
    not TRANSFORMERS_LOADS,
    reason=f"add_adapter of transformers {hf.__version__} asks for peft 0.22, here is {peft.__version__}",
)
VOCABULARY, IMAGE_TOKEN, HIDDEN = 96, 95, 32
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
PROMPT = 9  # tokens of the longest prompt


class Family(NamedTuple):
    """How to build one kind of model, what its images are, and the path of its decoder."""

    build: Callable[[], nn.Module]
    images: Callable[[int], dict]  # from the number of rows
    image_tokens: int
    decoder: str


def _llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))


def _qwen2():
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT))


def _llava():
    return make_llava(TEXT, VISION, image_token_index=IMAGE_TOKEN, vision_feature_layer=-2)


def _llava_next():
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            text_config=hf.LlamaConfig(**TEXT),
            vision_config=hf.CLIPVisionConfig(**VISION),
            image_token_index=IMAGE_TOKEN,
            image_grid_pinpoints=[[8, 8]],
            vision_feature_layer=-2,
        )
    )


def _qwen2_5_vl():
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config={
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": HIDDEN,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "fullatt_block_indexes": [1],
                "window_size": 16,
            },
            image_token_id=IMAGE_TOKEN,
            video_token_id=94,
            vision_start_token_id=93,
            vision_end_token_id=92,
        )
    )


def _smolvlm():
    return hf.SmolVLMForConditionalGeneration(
        hf.SmolVLMConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**VISION, "model_type": "smolvlm_vision"},
            image_token_id=IMAGE_TOKEN,
            scale_factor=2,
        )
    )


def _pixels(*shape):
    return lambda rows: {"pixel_values": torch.randn(rows, *shape)}


FAMILIES = {
    "llama": Family(_llama, lambda rows: {}, 0, "model"),
    "qwen2": Family(_qwen2, lambda rows: {}, 0, "model"),
    "llava": Family(_llava, _pixels(3, 8, 8), 4, "model.language_model"),
    "llava_next": Family(
        _llava_next,
        # The whole image and its one tile, 2 x 2 patches each, and a token at the end of each row of the tile.
        lambda rows: {"pixel_values": torch.randn(rows, 2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8]] * rows)},
        10,
        "model.language_model",
    ),
    "qwen2_5_vl": Family(
        _qwen2_5_vl,
        lambda rows: {
            "pixel_values": torch.randn(rows * 16, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        },
        4,
        "model.language_model",
    ),
    "smolvlm": Family(_smolvlm, _pixels(1, 3, 8, 8), 1, "model.text_model"),
}


def build(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family].build().eval()


def adapt(model: nn.Module, **settings) -> nn.Module:
    """A copy of the model, adapted so strongly that a wrong routing shows."""
    torch.manual_seed(1)
    options = {"r": 2, "num_factors": 6, "alpha": 24, "init_weights": False, "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(copy.deepcopy(model), ConditionalMixLoRAConfig(**options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "router" in name:
                parameter.normal_()
    return adapted.eval()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in trained(model).items()}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"trained, but without a gradient: {missing}"
    model.zero_grad()
    return found


def prompts(rows: int = 3, lengths=(9, 6, 7), image_tokens: int = 0, seed: int = 3) -> list[torch.Tensor]:
    """One instance each, [length + image_tokens]; the image's tokens follow the first."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(3, 90, (length,), generator=generator) for length in lengths[:rows]]
    image = torch.full((image_tokens,), IMAGE_TOKEN)
    return [torch.cat((text[:1], image, text[1:])) for text in texts]


def pad(instances: list[torch.Tensor], side: str, value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of equal length [B, L] and their mask. What stands in the padding must not matter."""
    longest = max(map(len, instances))
    rows, masks = [], []
    for tokens in instances:
        fill, real = tokens.new_full((longest - len(tokens),), value), torch.ones(len(tokens), dtype=torch.long)
        none = torch.zeros(len(fill), dtype=torch.long)
        rows.append(torch.cat((fill, tokens) if side == "left" else (tokens, fill)))
        masks.append(torch.cat((none, real) if side == "left" else (real, none)))
    return torch.stack(rows), torch.stack(masks)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Distance of two tensors relative to the second's largest entry."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
