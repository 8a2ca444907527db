"""MixLoRA as a method of peft: made, saved, loaded, added, switched and taken out like any other."""

import copy
import json
import pickle

import pytest
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from mixlora_kernels import MixLoRAConfig
from mixlora_kernels.peft import ConditionalMixLoRAConfig, ConditionalMixLoRAModel, MixLoRALayer

from .models import FAMILIES, adapt, build, gradients, needs_transformers_adapters, pad, prompts, trained

ROUTERS = ("router_A", "router_B", "router_AB")


def batch(rows: int = 3) -> dict:
    ids, mask = pad(prompts(rows), "right")
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def layers_of(model) -> dict[str, MixLoRALayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MixLoRALayer)}


def test_the_type_is_a_member_of_pefts_enumeration():
    config = ConditionalMixLoRAConfig()
    assert config.peft_type is PeftType("CONDITIONAL_MIXLORA") is PeftType["CONDITIONAL_MIXLORA"]
    assert config.peft_type in list(PeftType)
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_config_is_both():
    config = ConditionalMixLoRAConfig.published(r=2, num_factors=8, target_modules=["q_proj"])
    assert isinstance(config, MixLoRAConfig) and isinstance(config, PeftConfig)
    assert (config.gate, config.scaling, config.target_modules) == ("binary", 8.0, {"q_proj"})


def test_the_config_survives_a_file(tmp_path):
    config = ConditionalMixLoRAConfig(r=3, num_factors=9, dropout=0.1, pool="prompt", target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    for cls in (PeftConfig, ConditionalMixLoRAConfig):
        assert cls.from_pretrained(tmp_path) == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CONDITIONAL_MIXLORA"


def test_only_the_adapter_is_trained_and_all_of_it():
    model = adapt(build()).train()
    assert all(".mixlora_adapter.default." in name for name in trained(model))
    assert len(trained(model)) == 14 * 5
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    gradients(model)


@pytest.mark.parametrize("routing", [{"routing": "random"}, {"conditioning": "none"}, {"gate": "binary"}])
def test_what_gets_no_gradient_is_not_trained(routing):
    """DistributedDataParallel waits for the gradient of everything that requires one."""
    model = adapt(build(), **routing).train()
    for _ in range(2):
        names = " ".join(trained(model))
        assert ("router" in names) == (routing == {"conditioning": "none"})
        model(**batch(), labels=batch()["input_ids"]).loss.backward()
        gradients(model)
        model.set_adapter("default")  # which in peft sets everything to be trained
        model.base_model.set_requires_grad("default")


def test_kept_routing_still_trains_the_routers():
    """A forward on a cache that was filled with gradients: the gate leads back to the routers of the prefill."""
    model = adapt(build()).train()
    ids = prompts(1)[0][None]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    model(input_ids=ids[:, :1], past_key_values=cache).logits.logsumexp(-1).sum().backward()
    gradients(model)


def test_saving_and_loading(tmp_path):
    base = build("llava")
    model = adapt(base, modules_to_save=["multi_modal_projector"])
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1)
    kind = FAMILIES["llava"]
    ids, mask = pad(prompts(2, image_tokens=kind.image_tokens), "left")
    inputs = {"input_ids": ids, "attention_mask": mask, **kind.images(2)}
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == sum(value.numel() for value in trained(model).values())
    assert {key.rpartition(".")[2] for key in saved if "mixlora" in key} == {"lora_A", "lora_B", *ROUTERS}
    for options in ({}, {"adapter_name": "other"}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options)
        assert torch.equal(loaded(**inputs).logits, expected)
        assert bool(trained(loaded)) == ("is_trainable" in options)


def test_adapter_holds_only_its_own_parameters(tmp_path):
    """Of a 7B model (E 16, r 4), counted without making it."""
    E, r, layers = 16, 4, 32
    shapes = {(4096, 4096): 4, (4096, 11008): 2, (11008, 4096): 1}
    expected = layers * sum(n * (E * (a + b) + 2 * E * a + r * E * a) for (a, b), n in shapes.items())
    import transformers as hf

    config = hf.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers)
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(config)
    adapted = get_peft_model(model, ConditionalMixLoRAConfig(r=r, num_factors=E), low_cpu_mem_usage=True)
    saved = get_peft_model_state_dict(adapted)
    assert sum(value.numel() for value in saved.values()) == expected
    assert len(saved) == layers * 7 * 5


@needs_transformers_adapters
def test_transformers_loads_it(tmp_path):
    base = build()
    model = adapt(base)
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(base)
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(other), logits_of(model))
    other.load_adapter(str(tmp_path), adapter_name="again")
    other.set_adapter("again")
    assert torch.equal(logits_of(other), logits_of(model))
    other.disable_adapters()
    assert torch.equal(logits_of(other), logits_of(base))


@needs_transformers_adapters
def test_transformers_adds_and_saves_it(tmp_path):
    base = build()
    model = copy.deepcopy(base)
    model.add_adapter(ConditionalMixLoRAConfig(r=2, num_factors=4, init_weights=False))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model.eval()))


def test_injection():
    base = build()
    model = adapt(base)
    injected = inject_adapter_in_model(copy.deepcopy(model.peft_config["default"]), copy.deepcopy(base))
    injected.load_state_dict(model.base_model.model.state_dict())
    assert torch.equal(logits_of(injected.eval()), logits_of(model))


def test_several_adapters(tmp_path):
    base = build()
    model, second = adapt(base), adapt(base, r=3, num_factors=4)
    second.save_pretrained(tmp_path)
    alone = {"default": logits_of(model), "second": logits_of(second), "base": logits_of(base)}
    model.load_adapter(tmp_path, "second")
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        assert torch.equal(logits_of(model), alone[name])
        assert all(f".{name}." in parameter for parameter in trained(model))
    with model.disable_adapter():
        assert torch.equal(logits_of(model), alone["base"])
    model.base_model.set_adapter(["default", "second"])
    # Not a tolerance but a bound from below: apart by more than rounding could make them.
    assert not torch.allclose(logits_of(model), alone["default"], atol=1e-3)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(logits_of(model), alone["second"])
    assert not any(".default." in name for name in model.state_dict())


def test_two_active_adapters_add_up():
    base = nn.Linear(6, 5)
    config = ConditionalMixLoRAConfig(r=2, num_factors=4, target_modules=["0"], init_weights=False)
    model = get_peft_model(nn.Sequential(base), config)
    model.add_adapter("second", ConditionalMixLoRAConfig(r=1, num_factors=3, target_modules=["0"], init_weights=False))
    x = torch.randn(2, 7, 6)
    with model.disable_adapter():
        frozen = model(x)
    updates = []
    for names in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(names)
        updates.append(model(x) - frozen)
    torch.testing.assert_close(updates[2], updates[0] + updates[1])


def test_adapter_names_by_row():
    base = build()
    model, second = adapt(base), adapt(base, r=1)
    model.add_adapter("second", copy.deepcopy(second.peft_config["default"]))
    weights = {key.replace(".default.", ".second."): value for key, value in second.state_dict().items()}
    model.load_state_dict({**model.state_dict(), **{key: value for key, value in weights.items() if ".second." in key}})
    names = ["second", "default", "__base__"]
    with torch.no_grad():
        found = model(**batch(), adapter_names=names).logits
    for row, expected in enumerate((logits_of(second), logits_of(model), logits_of(base))):
        # float32: a row alone and a row of a batch are products of other shapes, summed in another order.
        torch.testing.assert_close(found[row], expected[row], rtol=1e-5, atol=1e-5)


def test_unloading_leaves_the_base_as_it_was():
    base = build()
    before, names = logits_of(base), [name for name, _ in base.named_modules()]
    model = get_peft_model(base, ConditionalMixLoRAConfig(r=2, num_factors=4, init_weights=False))
    logits_of(model)
    unloaded = model.unload()
    assert unloaded is base and [name for name, _ in base.named_modules()] == names
    assert torch.equal(logits_of(base), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_unloading_a_projector_that_was_trained():
    """It has maps but, unlike a head, no weight of its own."""
    base = build("llava")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    names = [name for name, _ in base.named_modules()]
    config = ConditionalMixLoRAConfig(r=2, num_factors=4, modules_to_save=["multi_modal_projector"])
    unloaded = get_peft_model(base, config).unload()
    assert [name for name, _ in unloaded.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in unloaded.state_dict().items())


@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_is_refused_with_the_reason(way):
    model = adapt(build())
    before = logits_of(model)
    with pytest.raises(ValueError, match="depends on the input") as refused:
        getattr(model, way)()
    assert isinstance(refused.value, NotImplementedError)
    assert torch.equal(logits_of(model), before)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast):
    base = build().bfloat16()
    model = get_peft_model(
        base, ConditionalMixLoRAConfig(r=2, num_factors=4, init_weights=False), autocast_adapter_dtype=autocast
    )
    assert {p.dtype for p in trained(model).values()} == {torch.float32 if autocast else torch.bfloat16}
    output = model(**batch(), labels=batch()["input_ids"])
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    gradients(model)


def test_a_linear_by_its_layout_only():
    """GPT-2's Conv1D, whose weight is the other way round."""
    import transformers as hf

    base = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64)).eval()
    model = adapt(base)
    assert len(layers_of(model)) == 4
    # Not a tolerance but a bound from below: apart by more than rounding could make them.
    assert not torch.allclose(logits_of(model), logits_of(base), atol=1e-3)


def test_the_tuner_is_pefts():
    model = adapt(build())
    assert isinstance(model, PeftModel) and isinstance(model.base_model, ConditionalMixLoRAModel)
    assert len(model.targeted_module_names) == 14
