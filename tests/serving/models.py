"""Tiny random models with adapters, saved as users would save them, and what Hugging Face's generate makes of prompts.

Head sizes are 32, the smallest that vLLM's attention for CPUs takes.
"""

from pathlib import Path

import torch
import transformers as hf
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mixlora_kernels import MixLoRAAdapter
from mixlora_kernels.peft import ConditionalMixLoRAConfig

VOCABULARY, IMAGE, NEW = 256, 255, 40
SIDE, IMAGE_TOKENS = 32, 16  # of a picture: pixels, and patches of a quarter of it
LENGTHS = (5, 60, 17, 33, 90, 8, 41, 25, 70, 12, 51, 3)
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Wide, so that the best token differs much from the next best, and float32's rounding decides nothing; not so wide
    # that the layers blow the rounding up.
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_llama(folder: Path, **settings) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**TEXT, **settings})).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder: Path) -> hf.PreTrainedTokenizerFast:
    """A word a token: token i is the word ``wi``, the last one ``<image>``; with a chat template."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, IMAGE)}, "<image>": IMAGE}
    words_alone = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    words_alone.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words_alone, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    tokenizer.chat_template = "{% for m in messages %}w3 {{ m['content'] }} w4 {% endfor %}"
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_llava(folder: Path) -> tuple[hf.LlavaForConditionalGeneration, hf.LlavaProcessor]:
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=SIDE // 4, projection_dim=64, initializer_range=0.3,
    )  # fmt: skip
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE, vision_feature_layer=-2,
        image_seq_length=IMAGE_TOKENS,
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    # Under the names of published checkpoints, which vLLM reads; transformers 5 saves the tower a level higher.
    file = folder / "model.safetensors"
    tower, inner = "vision_tower.", "vision_tower.vision_model."
    weights = {key if inner in key else key.replace(tower, inner): tensor for key, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    size = {"height": SIDE, "width": SIDE}
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size=size, crop_size=size), save_tokenizer(folder), patch_size=SIDE // 4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return model, processor


def make_picture(file: Path, seed: int) -> Image.Image:
    pixels = torch.randint(256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    picture.save(file)  # lossless: a png
    return picture


def save_adapter(model, folder: Path, **settings):
    """Adapt a model with parameters so large that another routing gives other tokens, and save the adapter."""
    torch.manual_seed(1)
    config = ConditionalMixLoRAConfig(**{"r": 2, "num_factors": 8, "init_weights": False, **settings})
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "router" in name:
                parameter.mul_(5)
            elif "modules_to_save" in name:
                parameter.mul_(1.5)
            elif "lora_B" in name:
                parameter.mul_(0.2)
    adapted.save_pretrained(folder)
    for module in adapted.modules():
        if isinstance(module, MixLoRAAdapter):
            module.backend = "reference"  # what is wanted comes from the paper's equations
    return adapted


def make_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, IMAGE, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def generate(model, prompt: list[int], new: int = NEW, **inputs) -> dict[str, list]:
    """The tokens that Hugging Face's generate chooses for a prompt alone, and their log-probabilities."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **inputs,
    )  # fmt: skip
    tokens = out.sequences[0, len(prompt) :]
    logits = torch.cat(out.logits).log_softmax(-1)
    return {"tokens": tokens.tolist(), "logprobs": logits.gather(1, tokens[:, None])[:, 0].tolist()}
