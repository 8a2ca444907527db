"""Bad input: a clear error, and the model is left as it was."""

import copy
import pickle
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load, save_file
from torch import nn

from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_kernels.peft.registration import HOOKS, check_hooks

from .models import adapt, build, needs_transformers_adapters, prompts

IDS = torch.stack([tokens[:6] for tokens in prompts(2)])
WEIGHTS = "adapter_model.safetensors"


def state(model: nn.Module) -> tuple:
    """All that a failed call must not change."""
    modules = [(name, type(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    parameters = [(name, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    return modules, parameters


def assert_same(model: nn.Module, before: tuple) -> None:
    modules, parameters = state(model)
    assert modules == before[0]
    assert [entry[:2] for entry in parameters] == [entry[:2] for entry in before[1]]
    assert all(torch.equal(new, old) for (*_, new), (*_, old) in zip(parameters, before[1]))
    assert hasattr(model, "peft_config") == ("mixlora" in str(before[0]).lower())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ["q_proj", "typo_proj"]}, "typo_proj.*not found"),
        ({"target_modules": r".*\.typo"}, "not found"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is not supported"),
        ({"target_modules": ["q_proj", "self_attn"]}, "self_attn is not supported"),
        ({"layers_to_transform": [7]}, "no linear layers"),
    ],
)
def test_targets(settings, message):
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, ConditionalMixLoRAConfig(r=1, num_factors=2, **settings))
    assert_same(model, before)


def test_no_default_targets():
    with pytest.raises(ValueError, match=r"Please specify `target_modules`.*get_decoder"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), ConditionalMixLoRAConfig(r=1, num_factors=2))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 5, "num_factors": 4}, "must not exceed"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"task_type": "POETRY"}, "task type"),
    ],
)
def test_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        ConditionalMixLoRAConfig(**settings)


@pytest.fixture
def saved(tmp_path):
    adapt(build(), r=3).save_pretrained(tmp_path)
    return tmp_path


def cut(file, how):
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "corrupt":
        file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    elif how == "pickle":
        file.write_bytes(pickle.dumps({"a": 1}))
    elif how == "torch.save":
        torch.save(load(file.read_bytes()), file)
    else:
        file.write_bytes(b"")


def check_refused(saved, message: str) -> None:
    """As the first adapter of a model and as a further one."""
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, saved)
    assert_same(model, before)
    adapted = adapt(build())
    before = state(adapted)
    with pytest.raises(ValueError, match=message):
        adapted.load_adapter(saved, "second")
    assert_same(adapted, before)


@pytest.mark.parametrize("how", ["truncated", "corrupt", "pickle", "torch.save", "empty"])
def test_files(saved, how):
    cut(saved / WEIGHTS, how)
    message = "is a pickle" if how in ("pickle", "torch.save") else "truncated or corrupt"
    check_refused(saved, message)


def change(file, how):
    weights = load(file.read_bytes())
    key = next(key for key in weights if key.endswith("layers.1.mlp.up_proj.mixlora_adapter.router_AB"))
    if how == "missing":
        del weights[key]
    elif how == "unknown":
        weights[key.replace("layers.1", "layers.5")] = weights[key].clone()
    else:
        weights[key] = weights[key][:, :2].clone()
    save_file(weights, file)


@pytest.mark.parametrize("how", ["missing", "unknown", "shapes"])
def test_weights_that_do_not_fit(saved, how):
    change(saved / WEIGHTS, how)
    message = rf"{how}.*layers\.{5 if how == 'unknown' else 1}\.mlp\.up_proj.*router_AB"
    check_refused(saved, message)
    adapted = adapt(build())
    before = state(adapted)
    # Another adapter's weights into one that is there: it stays, as it was.
    with pytest.raises(ValueError, match="do not fit"):
        adapted.load_adapter(saved, "default")
    assert_same(adapted, before)


def test_weights_that_do_not_fit_beside_a_projector(tmp_path):
    adapt(build("llava"), r=3, modules_to_save=["multi_modal_projector"]).save_pretrained(tmp_path)
    change(tmp_path / WEIGHTS, "missing")
    model = build("llava")
    before = state(model)
    with pytest.raises(ValueError, match=r"missing keys.*layers\.1\.mlp\.up_proj.*router_AB"):
        PeftModel.from_pretrained(model, tmp_path)
    assert_same(model, before)


def test_another_size_of_model(saved):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="other shapes"):
        PeftModel.from_pretrained(model, saved)


def test_a_missing_configuration(saved):
    shutil.move(saved / "adapter_config.json", saved / "elsewhere.json")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(build(), str(saved))


@needs_transformers_adapters
@pytest.mark.parametrize("how", ["truncated", "corrupt", "pickle", "missing", "unknown", "shapes"])
def test_transformers_own_loading(saved, how, tmp_path_factory):
    """Its log would report tensors that are missing or of another shape, and the model would go on without them."""
    broken = tmp_path_factory.mktemp("broken")  # what was loaded is still mapped from the whole file
    shutil.copytree(saved, broken, dirs_exist_ok=True)
    if how in ("missing", "unknown", "shapes"):
        change(broken / WEIGHTS, how)
        message = rf"{how}.*layers\.{5 if how == 'unknown' else 1}\.mlp\.up_proj.*router_AB"
    else:
        cut(broken / WEIGHTS, how)
        message = "is a pickle" if how == "pickle" else "truncated or corrupt"
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(str(broken))
    assert_same(model, before)
    for name in ("first", "second"):
        model.load_adapter(str(saved), adapter_name=name)
    model.set_adapter("first")
    before, expected = state(model), model(input_ids=IDS).logits
    with pytest.raises(ValueError, match=message):
        model.load_adapter(str(broken), adapter_name="third")
    assert_same(model, before)
    assert model.active_adapters() == ["first"] and "third" not in model.peft_config
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_transformers_own_loading_of_tensors(saved):
    weights = load((saved / WEIGHTS).read_bytes())
    key = next(iter(weights))
    config = ConditionalMixLoRAConfig(r=3, num_factors=6)
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match="missing keys.*" + key.removeprefix("base_model.model.").rpartition(".")[2]):
        rest = {name: value for name, value in weights.items() if name != key}
        model.load_adapter(peft_config=copy.deepcopy(config), adapter_state_dict=rest)
    assert_same(model, before)
    model.load_adapter(peft_config=config, adapter_state_dict=weights)


@pytest.mark.parametrize("owner, name", HOOKS)
def test_a_version_that_would_not_check_what_is_loaded(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    with pytest.raises(ImportError, match=f"{owner.__module__.partition('.')[0]} .*{name}"):
        check_hooks()
