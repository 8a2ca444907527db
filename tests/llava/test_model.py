"""LLaVA v1 from its parts: a language model, a CLIP, and the stage-one projector."""

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM

from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_llava.example import digits
from mixlora_llava.model.generate import answer, build_prompt
from mixlora_llava.model.load import empty_llava, linear_projector, load_adapter, load_llava, read_source
from mixlora_llava.model.patch import patch_llava
from mixlora_llava.model.small import word_tokenizer

from .tiny import WIDTH, tiny_llava


@pytest.fixture
def parts(tmp_path):
    tiny = tiny_llava()
    tokenizer = word_tokenizer(digits.texts())
    text = tiny.config.text_config
    text.vocab_size = len(tokenizer)
    LlamaForCausalLM(text).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    CLIPVisionModel(tiny.config.vision_config).save_pretrained(tmp_path / "vision")
    size = {"height": 8, "width": 8}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path / "vision")
    projector = {"model.mm_projector.weight": torch.randn(WIDTH, 12), "model.mm_projector.bias": torch.randn(WIDTH)}
    torch.save(projector, tmp_path / "mm_projector.bin")
    source = {name: str(tmp_path / name) for name in ("language", "vision")}
    return source | {"projector": str(tmp_path / "mm_projector.bin")}, projector


def test_parts_make_a_llava_that_answers(parts):
    source, projector = parts
    model, processor = load_llava(source)
    x = torch.randn(5, 12)
    want = x @ projector["model.mm_projector.weight"].T + projector["model.mm_projector.bias"]
    # The identity adds zeros only. float32 sums of twelve products, which two kernels may take in another order.
    assert torch.allclose(model.model.multi_modal_projector(x), want, atol=1e-5)
    language = LlamaForCausalLM.from_pretrained(source["language"])
    assert torch.equal(model.lm_head.weight, language.lm_head.weight)
    said = answer(model, processor, [build_prompt("Describe the image.", "bare")], [Image.new("RGB", (9, 9))])
    assert isinstance(said[0], str)
    counted = sum(p.numel() for p in empty_llava(source).parameters())
    assert counted == sum(p.numel() for p in model.parameters())


def test_a_projector_that_does_not_fit_is_refused(parts, tmp_path):
    source, _ = parts
    torch.save({"model.mm_projector.0.weight": torch.zeros(2, 2)}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="must hold one linear map"):
        load_llava(source)
    torch.save(
        {"mm_projector.weight": torch.zeros(WIDTH, 5), "mm_projector.bias": torch.zeros(WIDTH)},
        tmp_path / "mm_projector.bin",
    )
    with pytest.raises(ValueError, match="projector weight must be"):
        load_llava(source)
    with pytest.raises(ValueError, match="projector_hidden_act must be 'linear'"):
        linear_projector(tiny_llava(projector_hidden_act="gelu"))


@pytest.mark.parametrize("config", [ConditionalMixLoRAConfig(r=2, num_factors=4), LoraConfig(r=2)])
def test_an_adapter_of_another_model_is_refused(tmp_path, config):
    patch_llava(tiny_llava(projector_hidden_act="gelu"), config, train_projector=True).model.save_pretrained(tmp_path)
    wider = tiny_llava(projector_hidden_act="gelu").config
    wider.text_config.hidden_size *= 2
    with pytest.raises(ValueError, match=r"no adapter of this model: (.|\n)*16"):
        load_adapter(type(tiny_llava())(wider), tmp_path)


def test_sources_of_models():
    assert read_source("a/b") == "a/b"
    assert read_source('{"language": "a", "vision": "b"}') == {"language": "a", "vision": "b"}
    with pytest.raises(ValueError, match="must be JSON"):
        read_source("{language: a}")
    with pytest.raises(ValueError, match=r"parts are language, vision .* got language, tower"):
        read_source('{"language": "a", "tower": "b"}')
    with pytest.raises(ValueError, match="model with its processor /nowhere, which is not a folder here"):
        load_llava("/nowhere")
