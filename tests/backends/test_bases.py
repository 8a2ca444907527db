"""A base that gives its output in another dtype than x's: y and its gradient have that dtype, x's gradient has x's."""

import pytest
import torch

import mixlora_kernels as mk

from ..cases import make_input, make_layer, relative_error
from .conftest import needs_triton

BACKENDS = ["torch", pytest.param("triton", marks=needs_triton), "reference"]
DTYPES = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)]


def tolerance(*dtypes):
    """Two units of the coarser dtype, for a rounded sum of rounded products; and float32's sums of a hundred."""
    return max(2 * torch.finfo(dtype).eps for dtype in dtypes) + 1e-5


def inputs(tokens, x_dtype, base_dtype, device):
    """A layer; x, a base's output and y's gradient, which every dtype holds; and a routing."""
    layer = make_layer(20, 37, dtype=torch.float32, backend="reference").to(device)
    x, frozen, dy = (
        make_input(2, tokens, width, seed=width, dtype=torch.bfloat16).detach().to(device) for width in (20, 37, 37)
    )
    routing = layer(x.float(), return_routing=True)[1].detach()
    x, frozen = x.to(x_dtype).requires_grad_(), frozen.to(base_dtype).requires_grad_()
    return layer, x, frozen, dy.to(base_dtype), mk.RoutingContext(routing=routing)


def results(layer, x, frozen, dy, context):
    y, _ = layer.adapter(x, frozen, context)
    return y, *torch.autograd.grad(y, [x, frozen, layer.adapter.lora_A, layer.adapter.lora_B], dy)


@pytest.mark.parametrize("tokens", [2, 30])  # by products with the whole pool, and by gathered rows
@pytest.mark.parametrize("x_dtype, base_dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_training(backend, x_dtype, base_dtype, tokens, device):
    layer, x, frozen, dy, context = inputs(tokens, x_dtype, base_dtype, device)
    double = make_layer(20, 37, backend="reference").to(device)
    exact = results(double, *(t.detach().double().requires_grad_() for t in (x, frozen)), dy.double(), context)
    layer.backend = backend
    found = results(layer, x, frozen, dy, context)
    assert [t.dtype for t in found] == [base_dtype, x_dtype, base_dtype, torch.float32, torch.float32]
    for value, true in zip(found, exact):
        assert relative_error(value, true) <= tolerance(x_dtype, base_dtype)
    assert torch.equal(found[2], dy)


@pytest.mark.parametrize("x_dtype, base_dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding(backend, x_dtype, base_dtype, device):
    layer, x, frozen, _, context = inputs(1, x_dtype, base_dtype, device)
    exact = make_layer(20, 37, backend="reference").to(device).adapter(x.double(), frozen.double(), context)[0]
    layer.backend = backend
    with torch.no_grad():
        y, _ = layer.eval().adapter(x, frozen, context)
    assert y.dtype == base_dtype and relative_error(y, exact) <= tolerance(x_dtype, base_dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sibling_without_a_gradient(backend, device):
    """The sibling that is used has the gradients that it has alone."""
    layer, x, frozen, dy, context = inputs(5, torch.bfloat16, torch.float32, device)
    layer.backend = backend
    _, expected, *_ = results(layer, x, frozen, dy, context)
    both = mk.RoutingContext(routing=mk.Routing(*(torch.stack((t, t)) for t in context.routing)))
    factors = [layer.adapter.factors] * 2
    (_, y), _ = mk.mixlora_siblings(x, [frozen, frozen], factors, layer.config, both, backend=backend)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], expected)


@needs_triton
@pytest.mark.parametrize("double", ["lora_A", "lora_B", "router_A"])
def test_parameters_in_float64(double, device):
    """Triton's interpreter converts float64 to bfloat16 wrongly; the kernels get float32."""
    layer = make_layer(20, 37, dtype=torch.bfloat16, backend="triton").to(device)
    x = make_input(2, 5, 20, dtype=torch.bfloat16).detach().to(device).requires_grad_()
    outputs = []
    for dtype in (torch.float32, torch.float64):
        parameter = torch.nn.Parameter(getattr(layer.adapter, double).detach().to(dtype))
        setattr(layer.adapter, double, parameter)
        y = layer(x)
        dx, gradient = torch.autograd.grad(y.square().sum(), [x, parameter])
        assert gradient.dtype == dtype
        outputs.append((y, dx, gradient.float()))
    assert outputs[0][0].isfinite().all() and all(map(torch.equal, *outputs))
