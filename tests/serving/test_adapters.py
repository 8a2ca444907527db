"""An adapter that does not fit, or is none, is refused by name. The page serving.md shows the messages."""

import re
import shutil

import pytest

from .conftest import needs_vllm
from .loading import DOCUMENTED, load

pytestmark = [*needs_vllm, pytest.mark.usefixtures("offline")]


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"routing": "random"},
            "routing='random': a request brings its prompt, and nothing else that could be routed by. "
            "Train with routing='instance'",
        ),
        (
            {"decode": "token"},
            "decode='token' routes each generated token anew, a server keeps the prompt's routing. "
            "Train with decode='prompt'",
        ),
    ],
    ids=["routing", "decode"],
)
def test_an_adapter_of_another_setting(saved, tmp_path, settings, message):
    from .models import save_adapter, save_llama

    save_adapter(save_llama(tmp_path / "model"), tmp_path / "adapter", **settings)
    with pytest.raises(ValueError, match=re.escape(f"- {message}")):
        load(tmp_path)
    assert message in DOCUMENTED


def test_an_adapter_of_another_kind(saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    from .models import save_llama

    get_peft_model(save_llama(tmp_path / "model"), LoraConfig()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter of the kind LORA, load_format='mixlora' serves") as caught:
        load(tmp_path)
    assert str(caught.value).replace(str(tmp_path / "adapter"), "FOLDER") in DOCUMENTED


@pytest.mark.parametrize(
    "extra, message",
    [
        ({}, "got None"),
        ({"adapter": ["one", "two"]}, "got ['one', 'two']: a server serves one adapter, start a server for each"),
    ],
    ids=["none", "two"],
)
def test_no_adapter_and_two(saved, extra, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(saved, model_loader_extra_config=extra)
    assert message in DOCUMENTED


def test_a_folder_without_an_adapter(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} has no adapter_config.json")):
        load(saved, model_loader_extra_config={"adapter": str(tmp_path)})
    assert "FOLDER has no adapter_config.json: give the folder that save_pretrained wrote" in DOCUMENTED


def test_a_key_that_would_replace_a_frozen_weight(saved, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved, tmp_path / "saved")
    file = tmp_path / "saved" / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.embed_tokens.weight": torch.zeros(256, 128)}, file)
    with pytest.raises(ValueError, match=r"nothing was loaded\. unknown keys: \['model\.embed_tokens"):
        load(tmp_path / "saved")


@pytest.mark.parametrize("name", ["reference", 3])
def test_a_backend_that_serving_has_not(saved, name):
    message = f"backend must be 'torch', 'triton' or left out, got {name!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        load(saved, model_loader_extra_config={"adapter": str(saved / "adapter"), "backend": name})
    assert message.replace("3", "'reference'") in DOCUMENTED


@pytest.fixture(scope="module")
def on_models(saved, engines, tmp_path_factory):
    """What depends on the model's layers, which vLLM makes in a running engine only: the errors by name."""
    import transformers as hf

    from .models import TEXT, save_adapter

    folder = tmp_path_factory.mktemp("models")
    deep = {**TEXT, "num_hidden_layers": 4}
    save_adapter(hf.LlamaForCausalLM(hf.LlamaConfig(**{**deep, "intermediate_size": 224})), folder / "wide_adapter")
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**deep))
    model.save_pretrained(folder / "sliding")
    layers = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 32}
    hf.LlamaConfig(**deep, **layers, architectures=["LlamaForCausalLM"]).save_pretrained(folder / "sliding")
    save_adapter(model, folder / "sliding_adapter")
    folders = {
        "another model": (saved / "model", folder / "wide_adapter"),
        "sliding window": (folder / "sliding", folder / "sliding_adapter"),
    }
    results = engines.run(
        {
            name: {
                "engine": {"model": str(model), "model_loader_extra_config": {"adapter": str(adapter)}},
                "prompts": [],
                "new": 1,
            }
            for name, (model, adapter) in folders.items()
        }
    )
    return {name: result["error"] for name, result in results.items()}


def test_an_adapter_for_another_model(on_models):
    error = on_models["another model"]
    assert "ValueError: the adapter is for another model than LlamaForCausalLM" in error
    assert "model.layers.0.mlp.down_proj: the adapter maps 224 to 128, the model 192 to 128" in error
    assert "model.layers.0.mlp.down_proj: the adapter maps 224 to 128, the model 192 to 128" in DOCUMENTED
    assert "and 11 more" in error  # gate, up and down of three layers, and seven of a layer that is not there


def test_sliding_window_layers(on_models):
    message = (
        "2 layers have no full attention (model.layers.1.self_attn.attn: SlidingWindowSpec); a sliding window gives a "
        "request's first block away while it runs, and with it the routing. Add --disable-sliding-window if the model "
        "is to be used within its window, or serve another model"
    )
    assert f"- {message}" in on_models["sliding window"]
    assert message in DOCUMENTED
