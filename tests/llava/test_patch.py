"""What is patched, what is trained, and that undoing leaves the model as it was."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlavaNextConfig, LlavaNextForConditionalGeneration

from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_llava.model.patch import patch_llava

from .tiny import LAYERS, WIDTH, tiny_llava

CONFIG = ConditionalMixLoRAConfig(r=2, num_factors=4, task_type="CAUSAL_LM")


class OriginalLlava(LlamaForCausalLM):
    """The structure of LlavaLlamaForCausalLM: vision tower and projector beside the decoder's layers."""

    def __init__(self):
        super().__init__(
            LlamaConfig(
                hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2, vocab_size=48
            )
        )
        self.model.mm_projector = nn.Linear(12, WIDTH)
        self.model.vision_tower = nn.ModuleDict(
            {"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(12, 12)})])}
        )


def llava_next():
    config = tiny_llava().config
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(vision_config=config.vision_config, text_config=config.text_config, image_token_id=3)
    )


@pytest.mark.parametrize("make", [tiny_llava, llava_next, OriginalLlava])
@pytest.mark.parametrize("config", [CONFIG, LoraConfig(r=2, task_type="CAUSAL_LM")], ids=["mixlora", "lora"])
def test_adapts_the_decoder_and_nothing_else(make, config):
    model = make()
    patched = patch_llava(model, config, train_projector=True)
    leaves = {name.rpartition(".layers.")[2].partition(".")[2] for name in patched.modules}
    assert len(patched.modules) == 7 * LAYERS
    assert leaves == {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    trained = [name for name, p in patched.model.named_parameters() if p.requires_grad]
    assert all("mixlora_adapter" in name or "lora_" in name or "projector" in name for name in trained)
    report = patched.report()
    assert report["trainable"] == sum(p.numel() for p in patched.model.parameters() if p.requires_grad)
    assert report["projector"] > 0 and report["adapter"] > 0


def test_linear_projector_trains_its_first_map_only():
    patched = patch_llava(tiny_llava(), CONFIG, train_projector=True)
    trained = {name for name, p in patched.model.named_parameters() if p.requires_grad and "projector" in name}
    assert trained and all("linear_1" in name for name in trained)


def test_undo_restores_modules_values_trainability_and_hooks():
    model = tiny_llava()
    model.model.vision_tower.requires_grad_(False)
    twin = copy.deepcopy(model)
    batch = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    patched = patch_llava(model, CONFIG, train_projector=True)
    for parameter in patched.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)  # as if trained
    assert not torch.equal(patched.model(**batch).logits, twin(**batch).logits)
    assert patched.undo() is model
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in twin.named_modules()]
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters()):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad, name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**batch).logits, twin(**batch).logits)


def test_refuses_what_is_no_llava():
    with pytest.raises(ValueError, match="LlamaForCausalLM is no LLaVA"):
        patch_llava(LlamaForCausalLM(tiny_llava().config.text_config), CONFIG)


def test_refuses_when_nothing_matched_and_leaves_the_model_alone():
    model = tiny_llava()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="nothing in LlavaForConditionalGeneration matches"):
        patch_llava(model, ConditionalMixLoRAConfig(target_modules=r"model\.h\.\d+\.c_attn"))
    assert [name for name, _ in model.named_modules()] == names


def test_refuses_a_second_patch():
    model = tiny_llava()
    patch_llava(model, CONFIG)
    with pytest.raises(ValueError, match="adapted already"):
        patch_llava(model, CONFIG)
