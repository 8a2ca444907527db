"""Adapter folders that nobody should trust: each is refused, and the model is bit for bit as it was.

Every case goes through peft's two ways of loading and transformers' own, with safetensors and with ``.bin`` files.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from mixlora_kernels.peft import ConditionalMixLoRAConfig

from ..models import adapt, build, needs_transformers_adapters
from .adapters import (
    CONFIG,
    SAFE,
    WAYS,
    assert_same,
    check_refused,
    everything,
    load_by,
    query,
    rewrite,
    weights_of,
    write,
)


def test_the_sound_adapter_loads(folder):
    for way in WAYS:
        model, attempt = load_by(way, folder)
        before = everything(model)["logits"]
        adapted = attempt()
        adapted = adapted if way == "from_pretrained" else model
        if way == "load_adapter":
            adapted.set_adapter("second")
        # A bound from below: the adapter was made so strong that it shows.
        assert not torch.allclose(everything(adapted)["logits"], before, atol=1e-3)


def transformers_looks_inside(folder):
    """Whether transformers finds an adapter of LoRA in a subfolder. 5.17 reads its settings there, not its weights."""
    get_peft_model(build(), LoraConfig(r=2)).save_pretrained(folder / "inside")
    try:
        build().load_adapter(str(folder), adapter_kwargs={"subfolder": "inside"})
    except ValueError as error:
        assert "adapter model file not found" in str(error)
        return False
    return True


@needs_transformers_adapters
def test_a_subfolder(good, tmp_path):
    """What peft and transformers find in a subfolder is what is looked at."""
    inside = tmp_path / "ours" / "inside"
    inside.mkdir(parents=True)
    (inside / CONFIG).write_text((good / CONFIG).read_text())
    write(inside / SAFE, weights_of(good))
    PeftModel.from_pretrained(build(), inside.parent, subfolder="inside")
    adapt(build()).load_adapter(inside.parent, "second", subfolder="inside")
    ways = [lambda model: PeftModel.from_pretrained(model, inside.parent, subfolder="inside")]
    if transformers_looks_inside(tmp_path / "lora"):
        ways.append(lambda model: model.load_adapter(str(inside.parent), adapter_kwargs={"subfolder": "inside"}))
        ways[-1](build())
    rewrite(inside, **query(lora_A=None))
    for attempt in ways:
        model = build()
        before = everything(model)
        with pytest.raises(ValueError, match="missing keys"):
            attempt(model)
        assert_same(model, before)


@needs_transformers_adapters
def test_a_projector_that_is_not_the_models(tmp_path):
    """modules_to_save: its names, shapes, dtypes and values are looked at like the adapter's own."""
    adapt(build("llava"), target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]).save_pretrained(
        tmp_path
    )
    key = "base_model.model.model.multi_modal_projector.linear_1.weight"
    sound = weights_of(tmp_path)
    other = key.replace("linear_1", "linear_7")
    for changed, message in (
        ({key: None}, "missing keys: .*linear_1.weight"),
        ({key: None, other: sound[key]}, "missing keys: .*linear_1.weight.*unknown keys: .*linear_7"),
        ({key: sound[key][:-1].clone()}, "other shapes: .*linear_1.weight"),
        ({key: sound[key].long()}, "other dtypes: .*linear_1.weight"),
        ({key: sound[key] * float("nan")}, "Not finite: .*linear_1.weight"),
        ({key: None, "base_model.model.model.vision_tower.weight": sound[key]}, "unknown keys: .*vision_tower"),
    ):
        write(tmp_path / SAFE, {name: value for name, value in (sound | changed).items() if value is not None})
        for attempt in (
            lambda model: PeftModel.from_pretrained(model, tmp_path),
            lambda model: model.load_adapter(str(tmp_path)),
        ):
            model = build("llava")
            names = [(name, type(module)) for name, module in model.named_modules()]
            tensors = {name: value.clone() for name, value in model.state_dict().items()}
            with pytest.raises(ValueError, match=message):
                attempt(model)
            assert [(name, type(module)) for name, module in model.named_modules()] == names
            assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


@needs_transformers_adapters
def test_an_injection_that_fails_half_way():
    """modules_to_save that peft cannot wrap, found out when the adapters stand already."""
    for model in (build(), adapt(build())):
        before = everything(model)
        config = ConditionalMixLoRAConfig(r=1, num_factors=2, target_modules=["lm_head"], modules_to_save=["layers"])
        config.task_type = "CAUSAL_LM"
        with pytest.raises(TypeError, match="ModuleList"):
            (model.add_adapter("second", config) if hasattr(model, "peft_config") else model.add_adapter(config))
        if not hasattr(model, "peft_config"):
            model._hf_peft_config_loaded = before["rest"][-1]  # transformers sets it before it asks for the adapter
        assert_same(model, before)


def test_keys_that_are_mapped(good, tmp_path):
    """peft renames keys for older names of a model; they are compared after that."""
    (tmp_path / CONFIG).write_text((good / CONFIG).read_text())
    old = {key.replace("model.layers", "decoder.layers"): value for key, value in weights_of(good).items()}
    save_file(old, tmp_path / SAFE)
    mapping = {r"^decoder\.layers": "model.layers"}
    PeftModel.from_pretrained(build(), tmp_path, key_mapping=mapping)
    check_refused(tmp_path, ValueError, "missing keys: .*model.layers.*unknown keys: .*decoder.layers", WAYS[:2])
