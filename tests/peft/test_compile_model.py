"""torch.compile of a whole adapted model gives what the model gives."""

import pytest
import torch

from .models import adapt, build, gradients, pad, prompts, relative

TOLERANCE = 1e-5  # float32, and fused loops round at other places


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def losses(model, batch):
    logits = model(**batch, use_cache=False).logits
    (logits.log_softmax(-1)[..., 3] * batch["attention_mask"]).sum().backward()
    return logits.detach()


@pytest.mark.parametrize(
    "backend, checkpointing",
    [("aot_eager", False), ("aot_eager", True), ("inductor", False)],
    ids=["plain", "checkpointed", "inductor"],
)
def test_training(backend, checkpointing):
    model = adapt(build(), alpha=4).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled = torch.compile(model, backend=backend)
    for lengths in ((9, 6, 7), (8, 3, 8)):
        ids, mask = pad(prompts(3, lengths=lengths), "right")
        batch = {"input_ids": ids, "attention_mask": mask}
        expected, wanted = losses(model, batch), gradients(model)
        found = losses(compiled, batch)
        assert relative(found[mask.bool()], expected[mask.bool()]) < TOLERANCE
        scale = max(value.abs().max() for value in wanted.values())
        for name, gradient in gradients(model).items():
            assert (gradient - wanted[name]).abs().max() < TOLERANCE * scale, name


def test_generation():
    model = adapt(build(), alpha=4)
    ids, mask = pad(prompts(2), "left")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for cache in ("dynamic", "static"):
        expected = model.generate(input_ids=ids, attention_mask=mask, cache_implementation=cache, **options)
        inner = model.base_model.model
        eager, inner.forward = inner.forward, torch.compile(inner.forward, backend="aot_eager")
        found = model.generate(input_ids=ids, attention_mask=mask, cache_implementation=cache, **options)
        inner.forward = eager
        assert torch.equal(found, expected)
