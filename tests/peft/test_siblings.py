"""Layers that read the same x are computed together, and give what they give one by one."""

import copy
import gc

import pytest
import torch
from peft import get_peft_model
from torch import nn

from mixlora_kernels.peft import ConditionalMixLoRAConfig, siblings

from .models import adapt, build, gradients, pad, prompts

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# One addition of x's gradient in another place, passed through two decoder layers, in float32.
ONE_ADDITION = 1e-5


@pytest.fixture
def groups(monkeypatch):
    """The sizes of the groups that were computed together."""
    sizes, operation = [], siblings.mixlora_siblings

    def counted(x, bases, *args, **kwargs):
        sizes.append(len(bases))
        return operation(x, bases, *args, **kwargs)

    monkeypatch.setattr(siblings, "mixlora_siblings", counted)
    return sizes


@pytest.fixture
def alone(monkeypatch):
    """Call it to let every layer compute alone from then on."""
    return lambda: monkeypatch.setattr(siblings.Siblings, "compute", lambda *_: None)


def step(model, batch):
    logits = model(**batch, use_cache=False).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), gradients(model)


def check(got, wanted):
    assert torch.equal(got[0], wanted[0])
    scale = max(value.abs().max() for value in wanted[1].values())
    for name, gradient in got[1].items():
        assert (gradient - wanted[1][name]).abs().max() <= ONE_ADDITION * scale, name


@pytest.fixture
def batch():
    ids, mask = pad(prompts(3), "right")
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("settings", [{}, {"conditioning": "tied", "gate": "normalized"}, {"routing": "random"}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_decoder(settings, checkpointing, batch, groups, alone):
    model = adapt(build(), target_modules=TARGETS, dropout=0.2, **settings).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    together = step(model, batch)
    assert groups == [3, 2] * 2 * (2 if checkpointing else 1)
    alone()
    torch.manual_seed(1)
    check(step(model, batch), together)


def test_two_forwards_before_their_backwards(batch, groups, monkeypatch):
    """The first forward, whose layers were not known to be siblings, is recomputed after the second."""
    monkeypatch.setattr(siblings, "USUAL", ())
    model = adapt(build(), target_modules=TARGETS).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wanted = step(copy.deepcopy(model), batch)
    logits = [model(**batch, use_cache=False).logits for _ in range(2)]
    for result in logits:
        result.log_softmax(-1)[..., 3].sum().backward()
    doubled = {name: 2 * gradient for name, gradient in wanted[1].items()}
    check((logits[1].detach(), gradients(model)), (wanted[0], doubled))
    assert groups == [3, 2] * 4  # the second forward, and its recomputation


def test_generation(batch, groups, alone):
    model = adapt(build(), target_modules=TARGETS).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    ids, mask = pad(prompts(3), "left")
    model.generate(input_ids=ids, attention_mask=mask, **options)
    together = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert groups[-2:] == [3, 2] and len(groups) >= 16
    alone()
    apart = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert all(map(torch.equal, together.logits, apart.logits))


class Block(nn.Module):
    """Three layers that read the same x, in ways that the test chooses."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, n) for n in (8, 6, 8))
        self.run = lambda block, x: (block.a(x), block.b(x), block.c(x))

    def forward(self, input_ids):
        return self.run(self, input_ids)


def make_block(**settings):
    torch.manual_seed(0)
    config = ConditionalMixLoRAConfig(
        r=2, num_factors=5, target_modules=["a", "b", "c"], init_weights=False, pool="sequence", **settings
    )
    return get_peft_model(Block(), config).eval()


def run(model, x, how=None):
    if how is not None:
        model.base_model.model.run = how
    return model(input_ids=x)


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def settle(model):
    for _ in range(2):
        wanted = run(model, X, lambda block, x: (block.a(x), block.b(x), block.c(x)))
    return wanted


def test_a_member_that_is_not_called(groups):
    model = make_block()
    a, _, c = settle(model)
    assert groups == [3]
    for _ in range(2):
        got = run(model, X, lambda block, x: (block.a(x), block.c(x)))
        assert torch.equal(got[0], a) and torch.equal(got[1], c)
    assert groups == [3, 3, 2]


def test_a_member_that_is_called_twice(groups):
    model = make_block()
    a, b, _ = settle(model)
    got = run(model, X, lambda block, x: (block.a(x), block.b(x), block.b(x), block.a(x)))
    assert all(map(torch.equal, got, (a, b, b, a)))


def test_x_that_is_changed_between_the_calls():
    model = make_block()
    settle(model)

    def change(block, x):
        x = x.clone()
        a = block.a(x)
        x.mul_(2)
        return a, block.b(x), block.c(x)

    def fresh(block, x):
        return block.a(x), block.b(2 * x), block.c(2 * x)

    assert all(map(torch.equal, run(model, X, change), run(model, X, fresh)))


def test_siblings_that_were_expected_and_are_none(groups):
    """In cross-attention q reads another x than k and v."""

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in "qkv")

        def forward(self, input_ids):
            other = input_ids.flip(0)
            return self.q_proj(input_ids), self.k_proj(other), self.v_proj(other)

    config = ConditionalMixLoRAConfig(
        r=2, num_factors=5, target_modules=["q_proj", "k_proj", "v_proj"], init_weights=False, pool="sequence"
    )
    model = get_peft_model(Cross(), config).eval()
    results = [model(input_ids=X) for _ in range(3)]
    assert groups == [3, 2, 2]  # expected once, and then as it was observed
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_equal_values_are_not_the_same_x(groups):
    model = make_block()
    for _ in range(2):
        run(model, X, lambda block, x: (block.a(x), block.b(x.clone()), block.c(x.clone())))
    assert groups == []


@pytest.mark.parametrize("where", ["base_layer", "mixlora_adapter.default"])
def test_a_layer_whose_hooks_must_run_computes_alone(where, groups):
    model, calls = make_block(), []
    wanted = settle(model)
    layer = model.base_model.model.b
    hook = layer.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    got = run(model, X)
    assert all(map(torch.equal, got, wanted)) and calls == [1] and groups == [3]
    hook.remove()
    run(model, X)
    assert groups == [3, 3]


def test_other_kinds_of_linear_layers_share_the_adapters_alone(groups):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    model = make_block()
    settle(model)
    layer = model.base_model.model.b
    layer.base_layer.__class__ = Scaled
    alone = layer(X)  # outside of a forward
    got = run(model, X)[1]
    assert groups == [3, 3]
    torch.testing.assert_close(got, alone, rtol=1e-6, atol=1e-6)  # rows are instances there, products of other shapes


def test_adapters_that_differ_compute_alone(groups):
    model = make_block()
    settle(model)
    other = ConditionalMixLoRAConfig(r=2, num_factors=5, target_modules=["b"], init_weights=False, pool="sequence")
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    before = list(groups)
    run(model, X)
    assert groups == before


def test_mixed_adapters_compute_alone(groups):
    model = make_block()
    wanted = settle(model)
    base = model.base_model.model.a.base_layer(X)
    got = model(input_ids=X, adapter_names=["default", "__base__"])
    assert groups == [3]
    assert torch.equal(got[0][0], wanted[0][0]) and torch.equal(got[0][1], base[1])


def test_inference_mode_computes_alone(groups):
    """Its tensors count no changes, so that a change of x could go unseen."""
    model = make_block()
    wanted = settle(model)
    with torch.inference_mode():
        assert all(map(torch.equal, run(model, X.clone()), wanted))
    assert groups == [3]


def test_nothing_that_was_left_outlives_the_forward(groups):
    model = make_block()
    settle(model)

    def tensors():
        gc.collect()
        return sum(type(thing) in (torch.Tensor, nn.Parameter) for thing in gc.get_objects())

    def some(block, x):
        return block.a(x + 1).sum().item()

    before = tensors()
    run(model, X, some)
    assert groups == [3, 3] and tensors() == before


def test_a_copy_of_a_model_learns_its_own_siblings(groups):
    model = make_block()
    wanted = settle(model)
    other = copy.deepcopy(model)
    assert other.base_model.model.a.family.layers == ()
    with torch.no_grad():
        for parameter in other.base_model.model.b.mixlora_adapter.parameters():
            parameter.zero_()
    for _ in range(2):
        got = run(other, X)
    assert groups == [3, 3] and torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], other.base_model.model.b.base_layer(X))
