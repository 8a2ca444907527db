"""What the tests of hostile adapters share: ways to load one, and what a refusal must not change."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save_file

from mixlora_kernels.peft import MixLoRALayer

from ..models import TRANSFORMERS_LOADS, adapt, build, prompts

IDS = torch.stack([tokens[:6] for tokens in prompts(2)])
CONFIG, SAFE, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MODEL = "base_model.model.model"
QUERY = f"{MODEL}.layers.0.self_attn.q_proj.mixlora_adapter"
WAYS = ("from_pretrained", "load_adapter", *(["transformers"] if TRANSFORMERS_LOADS else []))


def everything(model) -> dict:
    """All that a refusal must not change."""
    tensors = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    layers = {
        name: (list(module.mixlora_adapter), list(module.configs), module.active_adapter)
        for name, module in model.named_modules()
        if isinstance(module, MixLoRALayer)
    }
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    known = sorted(model.peft_config) if hasattr(model, "peft_config") else None
    flags = getattr(model, "_hf_peft_config_loaded", None)
    return {"tensors": tensors, "rest": (trained, modules, hooks, layers, known, flags), "logits": logits}


def assert_same(model, before: dict) -> None:
    after = everything(model)
    assert after["rest"] == before["rest"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (place, tensor) in before["tensors"].items():
        assert after["tensors"][name][0] == place and torch.equal(after["tensors"][name][1], tensor), name
    assert torch.equal(after["logits"], before["logits"])


def load_by(way: str, folder: Path):
    """A model, and what tries to load the folder into it."""
    if way == "from_pretrained":
        model = build()
        return model, lambda: PeftModel.from_pretrained(model, folder)
    if way == "load_adapter":
        model = adapt(build())
        return model, lambda: model.load_adapter(folder, "second")
    model = build()
    options = {"use_safetensors": False} if (folder / BIN).exists() else {}
    return model, lambda: model.load_adapter(str(folder), adapter_name="first", **options)


def check_refused(folder: Path, error, message: str, ways=WAYS) -> None:
    for way in ways:
        model, attempt = load_by(way, folder)
        before = everything(model)
        with pytest.raises(error, match=message):
            attempt()
        assert_same(model, before)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / SAFE
    return load(file.read_bytes()) if file.exists() else torch.load(folder / BIN)


def write(file: Path, weights: dict[str, torch.Tensor]) -> None:
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save(weights, file)


def rewrite(folder: Path, **changed) -> None:
    """Other weights, by their keys; None takes one out."""
    weights = {key: value for key, value in (weights_of(folder) | changed).items() if value is not None}
    write(next(folder.glob("adapter_model.*")), weights)


def configure(folder: Path, **settings) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | settings))


def query(**tensors) -> dict[str, torch.Tensor]:
    return {f"{QUERY}.{name}": tensor for name, tensor in tensors.items()}
