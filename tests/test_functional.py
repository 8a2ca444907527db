"""The torch backend against the reference: every mode, odd shapes, forward and backward."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import mixlora_kernels as mk

from .cases import MODES, assert_same, make_input, make_layer, make_mask, make_task, mode_id, mostly_slow, run, trained

# Sums of at most a few hundred float64 terms in another order: some 1e-15 each, amplified by the softmax's
# exponents, which reach a few tens here.
EXACT = 1e-12


def both(layer, x, context=None):
    results = []
    for backend in ("torch", "reference"):
        layer.backend = backend
        results.append(run(layer, x, context))
    return results


def context_for(mode, B, L, **fields):
    if mode["routing"] == "task":
        task_mask = make_mask(B, 3, seed=8)
        fields |= {"task": make_task(B), "task_mask": task_mask}
    return mk.RoutingContext(**fields)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_every_mode(mode, dropout):
    layer = make_layer(**mode, dropout=dropout)
    assert_same(*both(layer, make_input(4, 6, 12), context_for(mode, 4, 6, mask=make_mask(4, 6))), EXACT)


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_every_mode_packed(mode):
    layer = make_layer(**mode, dropout=0.2)
    context = context_for(mode, 3, 5, cu_seqlens=torch.tensor([0, 4, 5, 15]), mask=make_mask(1, 15)[0] | True)
    assert_same(*both(layer, make_input(1, 15, 12), context), EXACT)


shapes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 5),
        "L": st.integers(1, 9),
        "d_in": st.integers(1, 21),
        "d_out": st.integers(1, 21),
        "num_factors": st.integers(1, 19),
        "r": st.integers(1, 19),
        "masked": st.booleans(),
        "packed": st.booleans(),
        "bias": st.booleans(),
        "conditioning": st.sampled_from(["factors", "none", "published", "tied"]),
        "gate": st.sampled_from(["straight_through", "binary", "weighted", "normalized"]),
        "dropout": st.sampled_from([0.0, 0.4]),
        "seed": st.integers(0, 2**16),
    }
)


@settings(max_examples=150, deadline=None)
@given(shapes)
def test_any_shape(case):
    B, L, seed = case["B"], case["L"], case["seed"]
    layer = make_layer(
        case["d_in"], case["d_out"], seed=seed, bias=case["bias"], num_factors=case["num_factors"],
        r=min(case["r"], case["num_factors"]), conditioning=case["conditioning"], gate=case["gate"],
        dropout=case["dropout"],
    )  # fmt: skip
    x, fields = make_input(B, L, case["d_in"], seed=seed), {}
    if case["masked"]:
        fields["mask"] = make_mask(B, L, seed=seed)
    if case["packed"]:
        x = make_input(B * L, case["d_in"], seed=seed)
        fields = {name: value.flatten() for name, value in fields.items()}
        fields["cu_seqlens"] = torch.arange(0, B * L + 1, L)
    assert_same(*both(layer, x, mk.RoutingContext(**fields)), EXACT)


def test_float32_agrees_with_the_reference():
    """1e-5 relative, the promise for float32."""
    layer = make_layer(257, 130, dtype=torch.float32, num_factors=16, r=4)
    for parameter in layer.adapter.parameters():  # logits of the size that training starts with
        parameter.data /= 8
    assert_same(*both(layer, make_input(4, 33, 257, dtype=torch.float32)), 1e-5)


# A straight-through gradient is by intention no derivative of the layer; test_straight_through says of what it is.
DIFFERENTIABLE = [m for m in MODES if m["gate"] != "straight_through" or m["routing"] == "random"]


@pytest.mark.parametrize("mode", mostly_slow(DIFFERENTIABLE, *range(3)), ids=mode_id)
def test_gradcheck(mode):
    """Numerical derivatives of y and of the probabilities with respect to x, the task and every parameter."""
    layer = make_layer(5, 4, num_factors=4, r=2, **mode)
    context = context_for(mode, 2, 3, mask=make_mask(2, 3))
    parameters = trained(layer)

    def f(x, task, *values):
        torch.manual_seed(0)
        y, routing = torch.func.functional_call(
            layer,
            dict(zip(parameters, values)),
            (x, context._replace(task=task)),
            {"return_routing": True},
        )
        return (y, routing.probs_a, routing.probs_b) if mode["routing"] != "random" else y

    assert torch.autograd.gradcheck(f, (make_input(2, 3, 5), context.task, *parameters.values()), atol=1e-6)


@pytest.mark.parametrize("conditioning", ["factors", "none", "published", "tied"])
def test_straight_through(conditioning):
    """The gradient is the derivative of the layer with gate_i = 1 + Δp_A[index_a[i]] + Δp_B[index_b[i]], the
    choice held: a central difference of that, along a random direction in all parameters and x at once."""
    layer = make_layer(5, 4, num_factors=4, r=2, conditioning=conditioning)
    x = make_input(2, 3, 5)
    y, routing, gradients = run(layer, x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    inputs = {"x": x, **trained(layer)}
    generator = torch.Generator().manual_seed(7)
    direction = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in inputs.items()
    }

    def surrogate(step):
        values = {name: (value + step * direction[name]).detach() for name, value in inputs.items()}
        moved = values.pop("x")
        _, now = torch.func.functional_call(layer, values, (moved,), {"return_routing": True})
        assert torch.equal(now.index_a, routing.index_a) and torch.equal(now.index_b, routing.index_b)
        choices = (("probs_a", "index_a"), ("probs_b", "index_b"))
        gate = 1 + sum(
            (getattr(now, probs) - getattr(routing, probs)).gather(1, getattr(routing, index))
            for probs, index in (choices[:1] if conditioning == "tied" else choices)
        )
        kept = mk.RoutingContext(routing=routing._replace(gate=gate.detach()))
        return (torch.func.functional_call(layer, values, (moved, kept)) * weight).sum()

    step = 1e-6
    numerical = (surrogate(step) - surrogate(-step)) / (2 * step)
    analytical = sum((gradients[name] * direction[name]).sum() for name in inputs)
    torch.testing.assert_close(analytical, numerical, rtol=1e-7, atol=1e-7)  # step² truncation, 1e-16 / step rounding


def test_probabilities_alone_have_a_gradient():
    """A balancing loss of the probabilities, without y."""
    layer, x = make_layer(), make_input(4, 6, 12)
    results = []
    for backend in ("torch", "reference"):
        layer.backend = backend
        _, routing = layer(x, return_routing=True)
        loss = (routing.probs_a.mean(0) ** 2).sum() + (routing.probs_b.mean(0) ** 3).sum()
        results.append(torch.autograd.grad(loss, [x, *(trained(layer)[f"adapter.{n}"] for n in ROUTED)]))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)


ROUTED = ("lora_A", "router_A", "router_B", "router_AB")


def test_kept_routing_repeats_the_choice_and_passes_the_gradient_to_its_gate():
    layer, x = make_layer(gate="weighted"), make_input(4, 6, 12)
    y, routing = layer(x, return_routing=True)
    again, same = layer(x, mk.RoutingContext(routing=routing), return_routing=True)
    torch.testing.assert_close(again, y, rtol=EXACT, atol=EXACT)
    assert same is routing
    for result in (y, again):  # the gate's graph leads to the routers either way
        (gradient,) = torch.autograd.grad(result.square().sum(), layer.adapter.router_A, retain_graph=True)
        assert gradient.abs().sum() > 0
    torch.testing.assert_close(
        *(torch.autograd.grad(out.square().sum(), layer.adapter.router_B, retain_graph=True) for out in (y, again))
    )
    detached = layer(x, mk.RoutingContext(routing=routing.detach()))
    assert torch.autograd.grad(detached.sum(), layer.adapter.router_A, allow_unused=True) == (None,)


def test_random_routing_draws_distinct_factors_from_torchs_generator():
    layer = make_layer(routing="random", num_factors=7, r=3)
    x = make_input(200, 1, 12)
    torch.manual_seed(1)
    _, first = layer(x, return_routing=True)
    _, second = layer(x, return_routing=True)
    torch.manual_seed(1)
    _, third = layer(x, return_routing=True)
    assert torch.equal(first.index_a, third.index_a) and torch.equal(first.index_b, third.index_b)
    assert not torch.equal(first.index_a, second.index_a) and not torch.equal(first.index_a, first.index_b)
    for index in (first.index_a, first.index_b):
        assert all(len(set(row)) == 3 for row in index.tolist())
        assert set(index.flatten().tolist()) == set(range(7))
    assert torch.equal(first.probs_a, torch.full((200, 7), 1 / 7, dtype=torch.float64))
