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


def load_changed(saved, folder, change) -> None:
    """Load the adapter with what ``change`` makes of its weights by name."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved, folder)
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    load(folder)


def test_a_key_that_would_replace_a_frozen_weight(saved, tmp_path):
    import torch

    key = "base_model.model.model.embed_tokens.weight"
    with pytest.raises(ValueError, match=r"nothing was loaded\. unknown keys: \['model\.embed_tokens"):
        load_changed(saved, tmp_path / "saved", lambda weights: {**weights, key: torch.zeros(256, 128)})


@pytest.mark.parametrize(
    "part, missing, first",
    [
        # Seven linears of a layer, each with lora_A, lora_B, two routers and the conditioning.
        (".layers.1.", 35, "model.layers.1.mlp.down_proj.mixlora_adapter.lora_A"),
        (".q_proj.", 15, "model.layers.0.self_attn.q_proj.mixlora_adapter.lora_A"),
    ],
    ids=["a layer", "a linear of every layer"],
)
def test_weights_without_some_layers(saved, tmp_path, part, missing, first):
    """The file alone does not tell: what is left of it is whole."""

    def without(weights):
        kept = {key: value for key, value in weights.items() if part not in key}
        assert len(weights) - len(kept) == missing
        return kept

    with pytest.raises(ValueError, match=re.escape(f"missing keys: ['{first}'")) as caught:
        load_changed(saved, tmp_path / "saved", without)
    assert str(caught.value).count("mixlora_adapter.") == missing


@pytest.fixture(scope="module")
def with_embeddings(tmp_path_factory):
    """A folder of a Llama and an adapter whose embeddings were trained in full."""
    from .models import save_adapter, save_llama

    folder = tmp_path_factory.mktemp("embeddings")
    save_adapter(save_llama(folder / "model"), folder / "adapter", modules_to_save=["embed_tokens"])
    return folder


def test_weights_without_a_module_to_save(with_embeddings, tmp_path):
    def without(weights):
        return {key: value for key, value in weights.items() if "embed_tokens" not in key}

    message = "nothing was loaded. missing keys: ['model.embed_tokens.weight']"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_changed(with_embeddings, tmp_path / "saved", without)
    assert message in DOCUMENTED


def test_the_whole_weights_are_accepted(with_embeddings, tmp_path):
    """The control: what follows is reached, and fails for want of vLLM's process groups."""
    with pytest.raises(AssertionError, match="group is not initialized"):
        load_changed(with_embeddings, tmp_path / "saved", dict)


@pytest.mark.parametrize(
    "module, name, other",
    [
        ("embed_tokens", "model.embed_tokens.weight", "lm_head.weight"),
        ("lm_head", "lm_head.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_trained_module_that_the_model_ties(tmp_path, module, name, other):
    from .models import save_adapter, save_llama

    base = save_llama(tmp_path / "model", tie_word_embeddings=True)
    save_adapter(base, tmp_path / "adapter", modules_to_save=[module])
    message = (
        f"modules_to_save trained {name}, which the model ties to {other}; vLLM would use the trained weights for "
        "both. Serve a copy of the model that is saved with tie_word_embeddings=False, so that each has weights of its "
        "own"
    )
    with pytest.raises(ValueError, match=re.escape(f"- {message}")):
        load(tmp_path)
    if module == "embed_tokens":
        assert message in DOCUMENTED


def test_a_model_that_ties_modules_that_were_not_trained(tmp_path):
    """The control: it is not refused, and fails for want of vLLM's process groups."""
    from .models import save_adapter, save_llama

    save_adapter(save_llama(tmp_path / "model", tie_word_embeddings=True), tmp_path / "adapter")
    with pytest.raises(AssertionError, match="group is not initialized"):
        load(tmp_path)


def test_an_adapter_for_a_model_of_other_sizes(saved, tmp_path):
    from .models import save_adapter, save_llama

    save_adapter(save_llama(tmp_path / "wide", intermediate_size=224), tmp_path / "adapter")
    wrong = "model.layers.0.mlp.down_proj.mixlora_adapter.lora_A: (8, 224) in the file, (8, 192) in the model"
    with pytest.raises(ValueError, match=re.escape(f"nothing was loaded. other shapes: ['{wrong}'")):
        load(saved, model_loader_extra_config={"adapter": str(tmp_path / "adapter")})
    assert f"nothing was loaded. other shapes: ['{wrong}'" in DOCUMENTED


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
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**deep))
    model.save_pretrained(folder / "sliding")
    layers = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 32}
    hf.LlamaConfig(**deep, **layers, architectures=["LlamaForCausalLM"]).save_pretrained(folder / "sliding")
    save_adapter(model, folder / "sliding_adapter")
    folders = {
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


def test_layers_that_cannot_be_served():
    """The message names five."""
    import torch
    from torch import nn
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from mixlora_kernels.serving.placement import place

    class Served(ReplicatedLinear):
        def __init__(self):  # without vLLM's process groups
            nn.Module.__init__(self)
            self.input_size, self.output_size, self.tp_rank, self.tp_size = 12, 8, 0, 1

    class LlavaForConditionalGeneration(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.ModuleList([Served()])
            self.layers = nn.ModuleList([Served()])

    weights = {"lora_A": torch.empty(4, 6), "lora_B": torch.empty(4, 8)}
    layers = {path: weights for path in ("tower.0", "layers.0", *(f"layers.{i}" for i in range(2, 8)))}
    with pytest.raises(ValueError) as caught:
        place(LlavaForConditionalGeneration(), layers, {"layers"})
    outside = (
        "the adapter is for another model than LlavaForConditionalGeneration: tower.0: it is outside of the text "
        "decoder, where there are no requests to route"
    )
    assert str(caught.value) == "; ".join(
        (
            outside,
            "layers.0: the adapter maps 6 to 8, the model 12 to 8",
            *(f"layers.{i}: the served model has no such linear layer" for i in (2, 3, 4)),
            "and 3 more",
        )
    )
    assert outside.replace("tower.0", "model.multi_modal_projector.linear_1") in DOCUMENTED


def test_sliding_window_layers(on_models):
    message = (
        "2 layers have no full attention (model.layers.1.self_attn.attn: SlidingWindowSpec); a sliding window gives a "
        "request's first block away while it runs, and with it the routing. Add --disable-sliding-window if the model "
        "is to be used within its window, or serve another model"
    )
    assert f"- {message}" in on_models["sliding window"]
    assert message in DOCUMENTED
