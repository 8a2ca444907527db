"""What can only be refused when vLLM has made the model's layers: by name, in the words of docs/serving.md."""

import pytest

from .conftest import DOCUMENTED, needs_vllm

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def on_models(saved, run_jobs, tmp_path_factory):
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
    jobs = {
        "another model": (saved / "model", folder / "wide_adapter"),
        "sliding window": (folder / "sliding", folder / "sliding_adapter"),
    }
    results = run_jobs(
        [
            {
                "engine": {"model": str(model), "model_loader_extra_config": {"adapter": str(adapter)}},
                "prompts": [],
                "new": 1,
            }
            for model, adapter in jobs.values()
        ]
    )
    return {name: result["error"] for name, result in zip(jobs, results)}


def test_an_adapter_for_another_model(on_models):
    error = on_models["another model"]
    assert "ValueError: the adapter is for another model than LlamaForCausalLM" in error
    assert "model.layers.0.mlp.down_proj: the adapter maps 224 to 128, the model 192 to 128" in error
    assert "and 11 more" in error  # gate, up and down of three layers, and seven of a layer that is not there


def test_sliding_window_layers(on_models):
    message = (
        "2 layers have no full attention (model.layers.1.self_attn.attn: SlidingWindowSpec); a sliding window gives a "
        "request's first block away while it runs, and with it the routing. Add --disable-sliding-window if the model "
        "is to be used within its window, or serve another model"
    )
    assert f"- {message}" in on_models["sliding window"]
    assert message in DOCUMENTED
