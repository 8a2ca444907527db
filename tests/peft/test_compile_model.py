"""torch.compile of a whole adapted model: one graph, and what the model gives without it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mixlora_kernels.op import mixlora_siblings
from mixlora_kernels.peft.layer import MixLoRALayer

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


def test_the_load_balancing_loss():
    """It is in the graph: the loss and the gradients are those of eager torch."""
    torch.compiler.reset()
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 1}))
    model = adapt(base, target_modules=["q_proj", "down_proj"], balance=0.5, conditioning="tied", pool="text").train()
    ids, mask = pad(prompts(3), "right")
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}
    expected = model(**inputs).loss
    expected.backward()
    wanted = gradients(model)
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).loss
    loss.backward()
    assert relative(loss.detach(), expected.detach()) < TOLERANCE
    scale = max(value.abs().max() for value in wanted.values())
    for name, gradient in gradients(model).items():
        assert (gradient - wanted[name]).abs().max() < TOLERANCE * scale, name
    torch.compiler.reset()


@pytest.fixture
def siblings(monkeypatch):
    """A model whose q, k and v are adapted, and the sizes of the groups that are computed."""
    sizes, compute = [], mixlora_siblings

    def counting(x, bases, *args, **kwargs):
        sizes.append(len(bases))
        return compute(x, bases, *args, **kwargs)

    for module in ("siblings", "layer"):
        monkeypatch.setattr(f"mixlora_kernels.peft.{module}.mixlora_siblings", counting)
    torch.compiler.reset()
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 1}))
    yield adapt(base, alpha=4, target_modules=["q_proj", "k_proj", "v_proj"]).train(), sizes
    torch.compiler.reset()


@pytest.mark.parametrize("broken", [False, True])
def test_siblings(siblings, broken, monkeypatch):
    """They are computed together in one graph, and where a graph ends after each of them."""
    model, sizes = siblings
    if broken:
        forward = MixLoRALayer.forward

        def breaking(self, *args, **kwargs):
            y = forward(self, *args, **kwargs)
            torch._dynamo.graph_break()
            return y

        monkeypatch.setattr(MixLoRALayer, "forward", breaking)
    check(model, torch.compile(model, backend="aot_eager", fullgraph=not broken))
    assert sizes == [3, 3]


def test_siblings_whose_input_is_changed(siblings):
    """A graph cannot take another way by that, and is refused. Eager, each layer then computes by itself."""
    model, sizes = siblings
    key = model.base_model.model.model.layers[0].self_attn.k_proj

    def change(_module, args):
        args[0].add_(1.0)

    key.register_forward_pre_hook(change)
    inputs = {"input_ids": pad(prompts(3), "right")[0], "use_cache": False}
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"(?s)assertion failed.*_is_unchanged"):
            torch.compile(model, backend="aot_eager")(**inputs)
        sizes.clear()
        model(**inputs)
    assert sizes == [3, 1, 1]


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
