"""torch.compile of a whole adapted model: one graph, and what the model gives without it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..cases import needs_compiler
from .models import TEXT, adapt, gradients, pad, prompts, relative

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # float32, and a compiled graph sums in another order


@pytest.fixture
def model():
    """One layer with one adapted projection: compilation takes its time for each."""
    torch.compiler.reset()
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 1}))
    yield adapt(base, alpha=4, target_modules=["down_proj"])
    torch.compiler.reset()


def step(model):
    ids, mask = pad(prompts(3), "right")
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    logits.log_softmax(-1)[:, 3].sum().backward()
    return logits.detach()


def check(model, compiled):
    expected, wanted = step(model), gradients(model)
    assert relative(step(compiled), expected) < TOLERANCE
    scale = max(value.abs().max() for value in wanted.values())
    for name, gradient in gradients(model).items():
        assert (gradient - wanted[name]).abs().max() < TOLERANCE * scale, name


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_training(model, backend):
    model.train()
    check(model, torch.compile(model, backend=backend, fullgraph=True))


def test_checkpointed_layers(model):
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check(model, torch.compile(model, backend="aot_eager"))


def test_steps_of_generation(model):
    """As generate() compiles them: single steps on a static cache."""
    ids, mask = pad(prompts(2), "left")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["cache_implementation"] = "static"
    expected = model.generate(input_ids=ids, attention_mask=mask, **options)
    inner = model.base_model.model
    eager, compiled = inner.forward, torch.compile(inner.forward, backend="aot_eager")

    def forward(*args, **kwargs):
        return (compiled if kwargs["input_ids"].shape[1] == 1 else eager)(*args, **kwargs)

    inner.forward = forward
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **options), expected)
