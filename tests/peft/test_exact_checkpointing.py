"""Training with activations recomputed: a layer's recomputation sees the forward it belongs to."""

import copy

import pytest
import torch

from .models import build, gradients, prompts
from .test_exact_training import adapt, alone, answer_of, batch_of, check, extra, rows_of


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl"])
def test_checkpointing_with_two_forwards_before_a_backward(family, reentrant):
    """State that is not tied to its forward is the second one's when the first is recomputed."""
    model = adapt(build(family))
    model.enable_input_require_grads()
    instances, first, own = batch_of(family)
    expected = alone(model, family, instances, own)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    others = {
        name: value.flip(0) if name in ("input_ids", "attention_mask") else value for name, value in first.items()
    }
    logits = rows_of(model(**first, use_cache=False, **extra(family, first["input_ids"])).logits, first)
    model(**others, use_cache=False, **extra(family, others["input_ids"]))
    sum(map(answer_of, logits)).backward()
    check(model, logits, *expected)


def test_checkpointing_with_a_reference_in_between():
    """Preference training: two branches, each followed by the model without its adapter, then one backward."""
    model = adapt(build())
    instances, first, own = batch_of("llama")
    expected, wanted = alone(model, "llama", instances, own)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    second = {name: value.flip(0) for name, value in first.items()}
    branches = []
    for branch in (first, second):
        branches.append(rows_of(model(**branch, use_cache=False).logits, branch))
        with torch.no_grad(), model.disable_adapter():
            model(**branch, use_cache=False)
    for found in branches:
        sum(map(answer_of, found)).backward()
    both = {name: 2 * gradient for name, gradient in wanted.items()}
    check(model, branches[0] + branches[1][::-1], expected * 2, both)


def test_checkpointing_switched_on_before_the_adapter():
    base = build()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = adapt(base)
    instances, batch, own = batch_of("llama")
    model.gradient_checkpointing_disable()
    expected = alone(model, "llama", instances, own)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    logits = rows_of(model(**batch).logits, batch)
    model(input_ids=batch["input_ids"])
    sum(map(answer_of, logits)).backward()
    check(model, logits, *expected)


def test_checkpointing_by_torch_wrappers():
    """What Accelerate's FSDP plugin does with activation_checkpointing."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = adapt(build())
    instances, batch, own = batch_of("llama")
    expected = alone(model, "llama", instances, own)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    logits = rows_of(model(**batch, use_cache=False).logits, batch)
    model(input_ids=batch["input_ids"], use_cache=False)
    sum(map(answer_of, logits)).backward()
    inner = "_checkpoint_wrapped_module."
    wrapped = {name.replace("layers.0.", f"layers.0.{inner}").replace("layers.1.", f"layers.1.{inner}"): value
               for name, value in expected[1].items()}  # fmt: skip
    check(model, logits, expected[0], wrapped)


def test_unknown_checkpointing_is_refused():
    from torch.utils.checkpoint import checkpoint

    model = adapt(build())
    layer = model.base_model.model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda x, **kwargs: checkpoint(lambda x: forward(x, **kwargs), x, use_reentrant=False)
    loss = answer_of(model(input_ids=prompts(1)[0][None], use_cache=False).logits)
    with pytest.raises(RuntimeError, match="outside the decoder's forward"):
        loss.backward()


def test_random_routing_is_the_same_when_recomputed():
    model = adapt(build(), routing="random")
    _, batch, _ = batch_of("llama")
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(8)
        loss = answer_of(model(**batch, use_cache=False).logits)
        loss.backward()
        losses.append((loss.item(), gradients(model)))
    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(losses[0][1][name], value) for name, value in losses[1][1].items())


def test_copies_of_a_model_do_not_meet():
    model = adapt(build())
    instances, batch, own = batch_of("llama")
    expected = alone(model, "llama", instances, own)
    other = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    logits = rows_of(model(**batch).logits, batch)
    other(input_ids=batch["input_ids"])
    sum(map(answer_of, logits)).backward()
    check(model, logits, *expected)
    logits = rows_of(other(**batch).logits, batch)
    sum(map(answer_of, logits)).backward()
    check(other, logits, *expected)
