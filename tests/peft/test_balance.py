"""The load-balancing loss in the training of a whole model."""

import warnings

import pytest
import torch
import transformers as hf

import mixlora_kernels as mk
from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_kernels.peft.side_information import find_side_information

from .models import TEXT, adapt, build, gradients, pad, prompts

TIED = {"conditioning": "tied", "gate": "normalized"}


def batch(rows: int = 3, seed: int = 3) -> dict:
    ids, mask = pad(prompts(rows, seed=seed), "right")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def pair(balance: float, **settings):
    """The same model with and without the loss, in training."""
    return (adapt(build(), balance=weight, **settings).train() for weight in (balance, 0.0))


def expected(model) -> float:
    """The mean over layers of the last forward's losses."""
    losses = [mk.balance_loss(routing) for routing in find_side_information(model).last.values()]
    return sum(losses).item() / len(losses)


@pytest.mark.parametrize("settings", [{}, TIED, {"gate": "weighted", "conditioning": "none"}])
def test_the_models_loss_has_it(settings):
    balanced, plain = pair(0.5, **settings)
    difference = balanced(**batch()).loss.item() - plain(**batch()).loss.item()
    assert difference == pytest.approx(0.5 * expected(plain), rel=1e-4)
    assert expected(plain) > 1.05
    (loss, *_), (without, *_) = (model(**batch(), return_dict=False) for model in (balanced, plain))
    assert loss.item() - without.item() == pytest.approx(difference, rel=1e-4)
    assert torch.equal(balanced.eval()(**batch()).loss, plain.eval()(**batch()).loss)


def test_its_gradient():
    """What it adds to a router's gradient is the slope of the losses of all layers, by a central difference.
    It reaches the router of a first layer through all the others too."""
    balanced, plain = (model.double() for model in pair(0.7, **TIED))
    for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        router, own = (
            model.base_model.model.model.get_submodule(name).mixlora_adapter["default"].router_A
            for model in (balanced, plain)
        )
        added = (torch.autograd.grad(model(**batch()).loss, r)[0] for model, r in ((balanced, router), (plain, own)))
        direction = torch.randn(own.shape, dtype=own.dtype, generator=torch.Generator().manual_seed(0))
        values, start = [], own.detach().clone()
        for sign in (1, -1):
            with torch.no_grad():
                own.copy_(start + sign * 1e-3 * direction)
                plain(**batch())
            values.append(expected(plain))
        with torch.no_grad():
            own.copy_(start)
        slope = 0.7 * (values[0] - values[1]) / 2e-3
        gradient, without = added
        # transformers computes norms and the loss in float32, which limits both sides
        assert ((gradient - without) * direction).sum().item() == pytest.approx(slope, rel=2e-3)
        assert abs(slope) > 1e-3


def test_accumulated_batches_add_their_parts():
    """Where the model divides its loss by the tokens of all accumulated batches, as the Trainer has it do."""
    balanced, plain = pair(0.5)
    batches = [batch(3), batch(2, seed=8)]
    counts = [(b["labels"][:, 1:] != -100).sum() for b in batches]
    total = sum(counts)
    for inputs, count in zip(batches, counts):
        mean = plain(**inputs).loss.item()
        losses = [m(**inputs, num_items_in_batch=total).loss.item() for m in (balanced, plain)]
        part = 0.5 * expected(plain) * (count / total).item()
        assert losses[0] - losses[1] == pytest.approx(part, rel=1e-4)
        assert losses[1] == pytest.approx(mean * (count / total).item(), rel=1e-5)  # the argument still has this name


def test_checkpointing():
    """Without reentry the gradients are the same; with it the routings have none, which is said."""
    model = adapt(build(), balance=0.5, **TIED).train()
    model(**batch()).loss.backward()
    before = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch()).loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, before[name]), name
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.warns(UserWarning, match="balance has no effect .*use_reentrant"):
        model(**batch()).loss.backward()


def test_where_it_has_no_effect():
    model = adapt(build(), balance=0.5).train()
    inputs = batch()
    del inputs["labels"]
    with pytest.warns(UserWarning, match="balance has no effect .* no labels"):
        model(**inputs, logits_to_keep=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(**batch())
        model.eval()(**inputs)
        model.generate(input_ids=inputs["input_ids"][:1], max_new_tokens=2, eos_token_id=None)


def test_adapters_have_weights_of_their_own():
    torch.manual_seed(0)
    model = adapt(build(), balance=0.5, **TIED)
    model.add_adapter("second", ConditionalMixLoRAConfig(r=2, num_factors=6, task_type="CAUSAL_LM", **TIED))
    model.train()
    model.base_model.set_adapter(["default", "second"])
    both, side = model(**batch()).loss.item(), find_side_information(model)
    own = [mk.balance_loss(routing) for (_, name), routing in side.last.items() if name == "default"]
    for config in model.peft_config.values():
        config.balance = 0.0
    assert both - model(**batch()).loss.item() == pytest.approx(0.5 * sum(own).item() / len(own), rel=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"balance": -0.1}, "balance must be at least 0"),
        ({"balance": 0.1, "routing": "random"}, "balance=0.1 needs routers that are trained"),
        ({"balance": 0.1, "gate": "binary"}, "balance=0.1 needs routers that are trained"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        mk.MixLoRAConfig(**settings)


def test_a_classifiers_loss_has_it():
    """Its labels are classes, not tokens."""
    config = hf.LlamaConfig(**{**TEXT, "num_hidden_layers": 1}, num_labels=3)
    ids, mask = pad(prompts(3), "right")
    given = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}
    losses = []
    for weight in (0.5, 0.0):
        torch.manual_seed(0)
        classifier = hf.LlamaForSequenceClassification(config)
        model = adapt(classifier, balance=weight, task_type="SEQ_CLS", **TIED).train()
        losses.append(model(**given).loss.item())
    assert losses[0] - losses[1] == pytest.approx(0.5 * expected(model), rel=1e-4)


class LogitsFirst(torch.nn.Module):
    """A model of one's own that returns (logits, loss)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.q_proj = torch.nn.Embedding(96, 32), torch.nn.Linear(32, 96)

    def forward(self, input_ids, labels=None):
        logits = self.q_proj(self.embedding(input_ids))
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_logits_are_no_loss():
    ids, found = torch.arange(24).view(3, 8) + 3, []
    for weight in (0.5, 0.0):
        model = adapt(LogitsFirst(), balance=weight, target_modules=["q_proj"], task_type=None).train()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(model(input_ids=ids, labels=ids))
        assert any("balance has no effect" in str(one.message) for one in caught) == bool(weight)
    assert all(map(torch.equal, *found))


def test_labels_behind_an_encoder_are_all_counted():
    """They are not shifted: with all tokens of the step in one batch, the whole loss is added."""
    found = []
    for weight in (1.0, 0.0):
        torch.manual_seed(0)
        config = hf.T5Config(
            vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, decoder_start_token_id=0,
            dropout_rate=0.0,
        )  # fmt: skip
        model = adapt(hf.T5ForConditionalGeneration(config), balance=weight, task_type="SEQ_2_SEQ_LM", **TIED).train()
        inputs = {"input_ids": torch.arange(12).view(3, 4) + 3, "labels": torch.tensor([[5], [6], [7]])}
        found.append([model(**inputs, **extra).loss.item() for extra in ({}, {"num_items_in_batch": 3})])
    (balanced, divided), (plain, _) = found
    assert balanced - plain > 1 and divided == pytest.approx(balanced, rel=1e-6)
