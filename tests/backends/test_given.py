"""A routing that is given may pair any factors: the backends against the reference."""

import pytest
import torch

import mixlora_kernels as mk

from ..cases import make_input, make_layer, relative_error
from .conftest import needs_triton

# Sums of some hundred float32 products in another order than the reference's: 6e-8 each.
CLOSE = 1e-5
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


def prepare(backend, index_a, index_b, tokens, device, **settings):
    """A layer, x, and a routing that chooses the same factors for both instances."""
    layer = make_layer(backend=backend, dtype=torch.float32, **settings).to(device)
    x = make_input(2, tokens, 12, dtype=torch.float32).detach().to(device).requires_grad_()
    index_a, index_b = (torch.tensor([index] * 2, device=device) for index in (index_a, index_b))
    gate = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 2.0]], device=device, requires_grad=True)
    probs = torch.full((2, 7), 1 / 7, device=device)
    return layer, x, mk.RoutingContext(routing=mk.Routing(index_a, index_b, gate, probs, probs))


def results(*case, **settings):
    """y, and the gradients of x, of both pools and of the gate."""
    layer, x, context = prepare(*case, **settings)
    y = layer(x, context)
    inputs = {"x": x, "lora_A": layer.adapter.lora_A, "lora_B": layer.adapter.lora_B, "gate": context.routing.gate}
    return {"y": y} | dict(zip(inputs, torch.autograd.grad(y.square().sum(), list(inputs.values()))))


def assert_as_reference(backend, *case, **settings):
    expected = results("reference", *case, **settings)
    for name, value in results(backend, *case, **settings).items():
        assert relative_error(value, expected[name]) <= CLOSE, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_pairs_may_be_untied(backend, device):
    assert_as_reference(backend, [0, 1, 2], [3, 4, 5], 5, device, conditioning="tied")


@pytest.mark.parametrize("tokens", [5, 20])  # by products with the whole pool, and by gathered rows
@pytest.mark.parametrize("index_a, index_b", [([0, 1, 2], [3, 3, 4]), ([1, 1, 2], [3, 5, 4]), ([6, 6, 6], [0, 0, 0])])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_factor_may_be_paired_twice(backend, index_a, index_b, tokens, device):
    """Equation 9 is a sum over slots, whatever factors stand in them."""
    assert_as_reference(backend, index_a, index_b, tokens, device)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_factor_may_be_paired_twice_in_decoding(backend, tokens, device):
    found = []
    for name in (backend, "reference"):
        layer, x, context = prepare(name, [1, 1, 2], [3, 3, 4], tokens, device)
        with torch.no_grad():
            found.append(layer.eval()(x, context))
    assert relative_error(*found) <= CLOSE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 20])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_gate_of_low_precision_is_a_number_like_any_other(backend, tokens, dtype, device):
    """The scale, 14 / 3 here, is not rounded to the gate's dtype; nor are the factors' gradients."""
    found = []
    for kind in (torch.float32, dtype):
        layer, x, context = prepare(backend, [0, 1, 2], [3, 4, 5], tokens, device)
        index_a, index_b, gate, *probs = context.routing
        gate = gate.detach().to(kind).requires_grad_()  # 0.5, 1, 2 and 3, which both hold
        y = layer(x, mk.RoutingContext(routing=mk.Routing(index_a, index_b, gate, *probs)))
        inputs = [x, layer.adapter.lora_A, layer.adapter.lora_B, gate]
        *gradients, dgate = torch.autograd.grad(y.square().sum(), inputs)
        assert dgate.dtype == kind
        found.append((y, *gradients, dgate.to(dtype)))
    assert all(map(torch.equal, *found))
