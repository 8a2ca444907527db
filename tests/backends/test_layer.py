"""The Triton kernels against the reference: every mode, drawn shapes, masks, packing and strides.

tests/mutations/kernels.py has the mistakes that these tests must notice.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import mixlora_kernels as mk

from ..cases import (
    MODES,
    assert_same,
    make_input,
    make_layer,
    make_mask,
    make_task,
    mode_id,
    mostly_slow,
    relative_error,
    run,
)

# The design's bound for float32: sums of some hundred products, each rounded to 6e-8 of its own size, in another
# order than the reference's; the softmax's exponents, which reach a few tens here, multiply what the logits lack.
CLOSE = 1e-5
# The paper's mode; shares without conditioning; tied pairs.
FAST = [
    MODES.index({"routing": "instance", "conditioning": conditioning, "gate": gate})
    for conditioning, gate in (("factors", "straight_through"), ("none", "weighted"), ("tied", "normalized"))
]


def both(backend, shape, context=None, d_in=40, d_out=37, device="cpu", change=lambda x: x, **layer_settings):
    """What ``run`` gives under a backend and under the reference."""
    results = []
    for name in (backend, "reference"):
        layer = make_layer(d_in, d_out, dtype=torch.float32, backend=name, **layer_settings).to(device)
        x = change(make_input(*shape, d_in, dtype=torch.float32).detach().to(device)).requires_grad_()
        results.append(run(layer, x, context))
    return results


def context_for(mode, B, **fields):
    if mode["routing"] == "task":
        fields |= {"task": make_task(B, dtype=torch.float32), "task_mask": make_mask(B, 3, seed=8)}
    return mk.RoutingContext(**fields)


@pytest.mark.parametrize("mode", mostly_slow(MODES, *FAST), ids=mode_id)
def test_every_mode(mode, backend, device):
    """21 tokens are two tiles in the interpreter, 40 columns two, and the middle of both is at no border."""
    context = to(context_for(mode, 3, mask=make_mask(3, 21)), device)
    assert_same(*both(backend, (3, 21), context, device=device, **mode), CLOSE)


def to(context, device):
    return mk.RoutingContext(*(field.to(device) if isinstance(field, torch.Tensor) else field for field in context))


@pytest.mark.slow
@pytest.mark.parametrize("masked", mostly_slow([False, True], 1))
@pytest.mark.parametrize("mode", mostly_slow([MODES[0], MODES[2], MODES[9]], 0), ids=mode_id)
def test_packed(mode, masked, backend, device):
    """Instances shorter and longer than a tile, one that is a whole tile, one of one token."""
    mask = make_mask(4, 10).reshape(1, 40) if masked else None
    if masked:
        mask[0, [0, 4, 5, 21]] = True
    context = context_for(mode, 4, cu_seqlens=torch.tensor([0, 4, 5, 21, 40]), mask=mask)
    assert_same(*both(backend, (1, 40), to(context, device), device=device, **mode), CLOSE)


shapes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "L": st.integers(1, 35),
        "d_in": st.integers(1, 70),
        "d_out": st.integers(1, 70),
        "num_factors": st.integers(1, 20),
        "r": st.integers(1, 20),
        "masked": st.booleans(),
        "packed": st.booleans(),
        "bias": st.booleans(),
        "columns": st.integers(0, 3),
        "conditioning": st.sampled_from(["factors", "none"]),
        "gate": st.sampled_from(["straight_through", "weighted"]),
        "seed": st.integers(0, 2**16),
    }
)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=shapes)
def test_shapes(case, backend, device):
    """Any size of everything; x is a slice of a wider tensor, whose rows lie further apart."""
    B, L, d_in = case["B"], case["L"], case["d_in"]
    mask = make_mask(B, L, seed=case["seed"]) if case["masked"] else None
    cu_seqlens = None
    shape = (B, L)
    if case["packed"]:
        ends = torch.randperm(B * L - 1, generator=torch.Generator().manual_seed(case["seed"]))[: B - 1] + 1
        cu_seqlens = torch.cat((torch.tensor([0]), ends.sort().values, torch.tensor([B * L])))
        shape, mask = (1, B * L), None

    def widen(x):
        wide = torch.full((*x.shape[:-1], d_in + case["columns"]), float("nan"), device=x.device)
        wide[..., :d_in] = x
        return wide[..., :d_in]

    assert_same(
        *both(
            backend, shape, to(mk.RoutingContext(mask=mask, cu_seqlens=cu_seqlens), device),
            d_in, case["d_out"], device, widen,
            seed=case["seed"], bias=case["bias"], num_factors=case["num_factors"],
            r=min(case["r"], case["num_factors"]), conditioning=case["conditioning"], gate=case["gate"],
        ),
        CLOSE,
    )  # fmt: skip


@pytest.mark.parametrize("pool", mostly_slow([(128, 64), (64, 64), (1, 1), (17, 16)], 2))
def test_pools(pool, backend, device):
    """Up to the largest; T of a large pool has a program for each of r E columns, and is tested by smaller ones."""
    E, r = pool
    conditioning = "factors" if E < 32 else "none"
    assert_same(*both(backend, (2, 5), device=device, num_factors=E, r=r, conditioning=conditioning), CLOSE)


def test_a_base_that_is_given_as_an_output(backend, device):
    """Then y is not updated in place, and dx holds the adapter's share alone."""
    results = []
    for name in (backend, "reference"):
        layer = make_layer(20, 37, dtype=torch.float32, backend=name, bias=False).to(device)
        x = make_input(2, 19, 20, dtype=torch.float32).detach().to(device).requires_grad_()
        frozen = make_input(2, 19, 37, seed=4, dtype=torch.float32).detach().to(device).requires_grad_()
        kept = frozen.detach().clone()
        y, routing = layer.adapter(x, frozen)
        inputs = {"x": x, "frozen": frozen, "lora_A": layer.adapter.lora_A, "router_A": layer.adapter.router_A}
        gradients = torch.autograd.grad((y * kept).sum(), list(inputs.values()))
        assert torch.equal(frozen, kept)
        results.append((y, routing, dict(zip(inputs, gradients))))
    assert_same(*results, CLOSE)


@pytest.mark.parametrize(
    "frozen", mostly_slow(["lora_A", "lora_B", "router_A", "router_AB", "x", "everything but x"], 0, 4)
)
def test_gradients_that_nobody_needs(frozen, backend, device):
    def shortened(name):
        layer = make_layer(20, 37, dtype=torch.float32, backend=name, bias=False).to(device)
        x = make_input(2, 19, 20, dtype=torch.float32).detach().to(device).requires_grad_(frozen != "x")
        for parameter_name, parameter in layer.adapter.named_parameters():
            parameter.requires_grad_(parameter_name != frozen and not frozen.startswith("every"))
        return run(layer, x)

    assert_same(shortened(backend), shortened("reference"), CLOSE)


@pytest.mark.parametrize("name", mostly_slow(["router_A", "router_B", "router_AB", "lora_A", "lora_B"], 1))
def test_a_parameter_of_another_dtype(name, backend, device):
    """A parameter in bfloat16 among others in float32: its gradient is rounded to it, by 2^-8 at most; and the
    reference rounds the sum over instances at each of them, so that 2^-7 lies between."""

    def result(backend):
        layer = make_layer(20, 37, dtype=torch.float32, backend=backend).to(device)
        getattr(layer.adapter, name).data = getattr(layer.adapter, name).data.bfloat16()
        y, routing, gradients = run(layer, make_input(2, 19, 20, dtype=torch.float32).detach().to(device))
        own = gradients.pop(f"adapter.{name}")
        return (y, routing, gradients), own

    (actual, own), (expected, rounded) = result(backend), result("reference")
    assert_same(actual, expected, CLOSE)
    assert own.dtype == torch.bfloat16 and relative_error(own, rounded) <= 2**-7


def test_gradients_of_the_probabilities_and_of_a_kept_gate(backend, device):
    def gradients(name):
        layer = make_layer(20, 37, dtype=torch.float32, backend=name).to(device)
        x = make_input(2, 19, 20, dtype=torch.float32).detach().to(device).requires_grad_()
        y, routing = layer(x, return_routing=True)
        loss = (routing.probs_a[:, 0] - 2 * routing.probs_b[:, 3] + (routing.gate * 3)[:, 1]).sum() + y.square().sum()
        parameters = list(layer.adapter.parameters())
        first = torch.autograd.grad(loss, [x, *parameters])
        only = torch.autograd.grad(layer(x, return_routing=True)[1].probs_b.square().sum(), parameters[3:])
        gate = routing.gate.detach().mul(1.5).requires_grad_()
        y = layer(x, mk.RoutingContext(routing=routing.detach()._replace(gate=gate)))
        return y, routing, dict(enumerate((*first, *only, *torch.autograd.grad(y.square().sum(), [x, gate]))))

    assert_same(gradients(backend), gradients("reference"), CLOSE)


@pytest.mark.slow
def test_two_runs_give_the_same_bits(backend, device):
    def everything():
        layer = make_layer(70, 70, dtype=torch.float32, backend=backend, dropout=0.3 * (backend == "triton")).to(device)
        x = make_input(3, 40, 70, dtype=torch.float32).detach().to(device).requires_grad_()
        y, routing, gradients = run(layer, x, to(mk.RoutingContext(mask=make_mask(3, 40)), device))
        return [y, *routing, *gradients.values()]

    assert all(torch.equal(a, b) for a, b in zip(everything(), everything()))


def test_padding_may_hold_anything(backend, device):
    """What a masked token holds reaches neither the routing nor another token's result. (A gradient it does reach,
    as in any layer: infinity times the zero that comes back for it.)"""
    mask = torch.ones(2, 20, dtype=torch.bool, device=device)
    mask[:, 17:] = False

    def result(filling):
        layer = make_layer(20, 37, dtype=torch.float32, backend=backend).to(device)
        x = make_input(2, 20, 20, dtype=torch.float32).detach().to(device)
        x[:, 17:] = filling
        y, routing = layer(x, mk.RoutingContext(mask=mask), return_routing=True)
        return [y[:, :17], *routing]

    assert all(torch.equal(a, b) for a, b in zip(result(0.0), result(float("inf"))))


def test_a_factor_nobody_chose_gets_an_exact_zero(backend, device):
    layer = make_layer(20, 37, dtype=torch.float32, backend=backend, conditioning="none", num_factors=20).to(device)
    x = make_input(2, 20, 20, dtype=torch.float32).detach().to(device)
    _, routing, gradients = run(layer, x)
    for name, index in (("lora_A", routing.index_a), ("lora_B", routing.index_b)):
        chosen = torch.zeros(20, dtype=torch.bool, device=device).index_fill(0, index.flatten(), True)
        gradient = gradients[f"adapter.{name}"]
        assert (gradient[~chosen] == 0).all() and (gradient[chosen].abs().sum(1) > 0).all()
