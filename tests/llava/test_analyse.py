"""Interference against finite differences, and selections by value."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn

from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_llava.analysis import interference, selection
from mixlora_llava.analysis.interference import Group
from mixlora_llava.model.patch import patch_llava

from ..cases import mostly_slow
from .tiny import WIDTH, tiny_llava

CONFIGS = {
    "mixlora": ConditionalMixLoRAConfig(r=2, num_factors=4, init_weights=False, dropout=0.3, task_type="CAUSAL_LM"),
    "weighted": ConditionalMixLoRAConfig(
        r=2, num_factors=4, init_weights=False, gate="weighted", task_type="CAUSAL_LM"
    ),
    "lora": LoraConfig(r=3, init_lora_weights=False, lora_dropout=0.3, task_type="CAUSAL_LM"),
}


def double_loss(logits, labels, **_):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def build(name):
    """A model that computes in float64 throughout: transformers' norm and loss would fall back to float32."""
    base = tiny_llava()
    for parent in list(base.model.language_model.modules()):
        for child, module in parent.named_children():
            if type(module).__name__ == "LlamaRMSNorm":
                setattr(parent, child, nn.RMSNorm(WIDTH, module.variance_epsilon))
    base.loss_function = double_loss
    model = patch_llava(base.double(), CONFIGS[name]).model.double()
    torch.manual_seed(3)
    batches = {}
    for task in ("one", "two"):
        batches[task] = []
        for _ in range(2):
            ids = torch.randint(4, 48, (2, 9))
            ids[:, 1:5] = 3  # an image of four patches
            labels = ids.clone()
            labels[:, :6] = -100
            pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
            batches[task].append(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
            )
    return model, batches


@pytest.mark.parametrize(
    "case",
    mostly_slow(
        [
            ("mixlora", Group(0, "attention", "A")),
            ("mixlora", Group(1, "mlp", "B")),
            ("weighted", Group(1, "mlp", "A")),
            ("lora", Group(0, "attention", "A")),
        ],
        0,
    ),
)
def test_equation_2_equals_finite_differences_to_first_order(case):
    """The losses themselves are evaluated at θ and at θ - λ g_j / |g_j|, as Equation 2's first line says."""
    name, group = case
    model, batches = build(name)
    parameters = interference.factor_groups(model)[group]
    computed = interference.loss_changes(interference.task_gradients(model, batches)[group])
    model.eval()

    def loss(batch):
        with torch.no_grad():
            return model(**batch).loss

    def step(batch, rate):
        gradients = torch.autograd.grad(model(**batch).loss, parameters)
        norm = sum(g.square().sum() for g in gradients).sqrt()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter.sub_(rate * gradient / norm)

    saved = [parameter.detach().clone() for parameter in parameters]
    errors = {}
    for rate in (1e-5, 1e-6):
        changes = torch.zeros_like(computed)
        for i, of_i in enumerate(batches.values()):
            for k, batch in enumerate(of_i):
                before = loss(batch)
                for j, of_j in enumerate(batches.values()):
                    for other in of_j:
                        with interference.constant_gates(model):
                            step(other, rate)
                        changes[i, k, j] += (before - loss(batch)) / len(of_j)
                        with torch.no_grad():
                            for parameter, value in zip(parameters, saved):
                                parameter.copy_(value)
        errors[rate] = float((changes - rate * computed).abs().max() / (rate * computed.abs().max()))
    # Relative to the change itself, the error is λ times curvature over slope: small, and a tenth for a tenth of λ.
    assert errors[1e-5] < 1e-2
    assert errors[1e-6] == pytest.approx(errors[1e-5] / 10, rel=0.1)


def test_equation_3_by_hand():
    gradients = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[-2.0, 0.0]]])  # three tasks, a batch each
    scores = interference.interference(gradients)
    root = 2**-0.5
    # (g_j / |g_j|) · g_i over |g_i|
    expected = torch.tensor([[1, root, -1], [root, 1, -root], [-1, -root, 1]])
    assert torch.allclose(scores, expected, atol=1e-6)  # float32 numbers up to 1, and a root among them


def test_expectations_run_over_the_batches():
    torch.manual_seed(0)
    gradients = torch.randn(2, 3, 5, dtype=torch.float64)
    scores = interference.interference(gradients)
    for i in range(2):
        for j in range(2):
            ratios = []
            for k in range(3):
                own, other = (
                    sum(g @ gradients[i, k] / g.norm() for g in gradients[task]) / 3 for task in (i, j)
                )  # fmt: skip
                ratios.append(other / own)
            assert scores[i, j] == pytest.approx(float(sum(ratios) / 3), rel=1e-12)  # float64
    assert torch.allclose(scores.diagonal(), torch.ones(2, dtype=torch.float64))


def test_measuring_leaves_the_model_as_it_was(tmp_path):
    model, batches = build("mixlora")
    model.train()
    model.peft_config["default"].gate = "straight_through"
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    result = interference.measure(model, batches)
    assert model.training and model.peft_config["default"].gate == "straight_through"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert set(result["groups"]) == {f"{n}.{b}.{p}" for n in (0, 1) for b in ("attention", "mlp") for p in "AB"}
    mean = np.mean([result["groups"][f"{n}.{b}.A"] for n in (0, 1) for b in ("attention", "mlp")], axis=0)
    assert np.allclose(mean, result["mean"]["A"])
    interference.plot({"mixlora": result}, tmp_path / "map.png")
    interference.plot({"mixlora": result}, tmp_path / "layer.png", "0.mlp")
    assert (tmp_path / "map.png").stat().st_size > 5000 and (tmp_path / "layer.png").stat().st_size > 5000


def test_needs_factors():
    with pytest.raises(ValueError, match="no factors"):
        interference.factor_groups(tiny_llava())


def made_selections(n=24):
    """Two tasks that choose from different halves of eight factors."""
    source = np.random.default_rng(0)
    tasks = ["low"] * n + ["high"] * n
    chosen = {}
    for layer in (0, 1):
        for module in ("gate_proj", "down_proj"):
            for pool in "AB":
                rows = [source.permutation(4)[:2] + (4 if task == "high" else 0) for task in tasks]
                chosen[f"model.layers.{layer}.mlp.{module}", pool] = np.array(rows)
    return selection.Selections(tasks, chosen, 8)


def test_multi_hot_and_usage_by_value():
    found = selection.Selections(["a", "b"], {("m.layers.3.mlp.up_proj", "A"): np.array([[2, 0], [1, 2]])}, 4)
    assert found.multi_hot(3, "mlp", "A").astype(int).tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
    assert found.usage() == {"m.layers.3.mlp.up_proj.A": {"a": [1, 0, 1, 0], "b": [0, 1, 1, 0]}}
    assert found.layers == [3]
    with pytest.raises(KeyError, match="attention of layer 3"):
        found.multi_hot(3, "attention", "A")


@pytest.mark.slow
def test_tasks_that_choose_apart_lie_apart(tmp_path):
    found = made_selections()
    assert found.multi_hot(0, "mlp", "B").shape == (48, 16) and (found.multi_hot(0, "mlp", "B").sum(1) == 4).all()
    silhouettes = selection.write(found, tmp_path)
    # Within a task some choices are shared, between tasks none: the Jaccard distance between them is 1.
    assert set(silhouettes) == {"0.mlp.A", "1.mlp.A", "0.mlp.B", "1.mlp.B"}
    assert all(0.2 < value < 1 for value in silhouettes.values())
    maps = json.loads((tmp_path / "tsne.json").read_text())
    points = np.array(maps[0]["points"])
    centres = points[:24].mean(0), points[24:].mean(0)
    own = [np.linalg.norm(points[:24] - centre, axis=1) for centre in centres]
    assert (own[0] < own[1]).mean() > 0.9
    for name in ("selection.npz", "usage.json", "tsne.png", "usage.png"):
        assert (tmp_path / name).stat().st_size > 500
    kept = np.load(tmp_path / "selection.npz")
    assert np.array_equal(kept["model.layers.0.mlp.down_proj.A"], found.chosen["model.layers.0.mlp.down_proj", "A"])


def test_heat_maps_have_one_scale_that_an_outlier_does_not_set():
    quiet, loud = torch.full((6, 6), 0.1).fill_diagonal_(1.0), torch.full((6, 6), -0.2).fill_diagonal_(1.0)
    loud[0, 1] = -50.0
    assert interference.colour_limit([quiet, loud]) == pytest.approx(0.2)  # of 60 scores, 59 are at most 0.2
    lost = torch.full((2, 2), float("nan"))  # tasks without a gradient
    assert interference.colour_limit([quiet, lost]) == pytest.approx(0.1)
    assert interference.colour_limit([lost]) == 1.0
