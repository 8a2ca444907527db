"""Layers, inputs and comparisons that several test files share."""

import itertools
import shutil

import pytest
import torch

import mixlora_kernels as mk

TASK_DIM = 5
# For a machine with Python and pip alone; backend="aot_eager" tests the graph there.
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++ on a CPU")

#: Every mode: routing x conditioning x gate, less what the configuration refuses.
MODES = [
    {"routing": routing, "conditioning": conditioning, "gate": gate}
    for routing, conditioning, gate in itertools.product(
        ("instance", "task", "random"),
        ("factors", "none", "published", "tied"),
        ("straight_through", "binary", "weighted", "normalized"),
    )
    if not (routing == "random" and gate in ("weighted", "normalized"))
]


def mostly_slow(values, *fast) -> list:
    """The values as parameters, of which all but those at the places ``fast`` are slow."""
    slow = pytest.mark.slow
    return [value if place in fast else pytest.param(value, marks=slow) for place, value in enumerate(values)]


def mode_id(mode: dict) -> str:
    return "-".join(mode.values())


def make_config(**settings) -> mk.MixLoRAConfig:
    if settings.get("routing") == "task":
        settings["task_dim"] = TASK_DIM
    return mk.MixLoRAConfig(**{"r": 3, "num_factors": 7, **settings})


def make_layer(d_in=12, d_out=9, *, seed=0, bias=True, dtype=torch.float64, backend=None, **settings):
    """A layer whose parameters are all away from zero, so that every term of the update counts."""
    generator = torch.Generator().manual_seed(seed)
    layer = mk.MixLoRALinear(d_in, d_out, make_config(**settings), bias=bias, dtype=dtype, backend=backend)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    return layer


def make_input(*shape, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def make_mask(B, L, *, seed=2):
    """A mask with holes anywhere, but at least one pooled token for each instance."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, L, generator=generator) < 0.6
    mask[torch.arange(B), torch.randint(L, (B,), generator=generator)] = True
    return mask


def make_task(B, T=3, *, seed=3, dtype=torch.float64):
    return make_input(B, T, TASK_DIM, seed=seed, dtype=dtype)


def trained(layer):
    """The names and parameters that require a gradient."""
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def run(layer, x, context=None, *, seed=5, weight_seed=6):
    """One forward and backward under a fixed seed: y, the routing, and the gradients of x, of the task embedding
    and of every trained parameter, of a loss that weighs every element of y differently."""
    torch.manual_seed(seed)
    y, routing = layer(x, context, return_routing=True)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(weight_seed), dtype=torch.float64)
    inputs = {"x": x} if x.requires_grad else {}
    if context is not None and context.task is not None and context.task.requires_grad:
        inputs["task"] = context.task
    inputs |= trained(layer)
    gradients = torch.autograd.grad((y * weight.to(y)).sum(), list(inputs.values()), allow_unused=True)
    return y, routing, dict(zip(inputs, gradients))


def relative_error(actual, expected, floor=1e-30) -> float:
    """The largest difference, relative to the largest value expected, or to ``floor`` if that is larger."""
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=floor)).item()


def assert_same(actual, expected, tolerance):
    """Compare two results of ``run``: the same factors chosen, and values and gradients within ``tolerance``."""
    (y, routing, gradients), (y0, routing0, gradients0) = actual, expected
    assert torch.equal(routing.index_a, routing0.index_a)
    assert torch.equal(routing.index_b, routing0.index_b)
    assert relative_error(y, y0) <= tolerance
    for name in ("gate", "probs_a", "probs_b"):
        assert relative_error(getattr(routing, name), getattr(routing0, name)) <= tolerance, name
    assert gradients.keys() == gradients0.keys()
    # A gradient that cancels to nothing (the weighted gate of a single slot is 1) is compared with its terms.
    floor = max((g.abs().max().item() for g in gradients0.values() if g is not None), default=0.0) / 1000
    for name, gradient in gradients.items():
        assert (gradient is None) == (gradients0[name] is None), name
        if gradient is not None:
            assert relative_error(gradient, gradients0[name], floor) <= tolerance, name
