"""Half precision and autocast: no worse than the eager computation, and routing in float32."""

import pytest
import torch

import mixlora_kernels as mk

from .cases import make_input, make_layer, relative_error, run

HALF = [torch.bfloat16, torch.float16]


def eager(x, layer, routing):
    """Gather and two batched products in x's dtype, by autograd: what everybody would write first."""
    adapter, dtype = layer.adapter, x.dtype
    A, B = adapter.lora_A.to(dtype)[routing.index_a], adapter.lora_B.to(dtype)[routing.index_b]
    update = torch.bmm(torch.bmm(x, A.mT), B) * layer.config.scaling
    return torch.nn.functional.linear(x, layer.base_layer.weight.to(dtype)) + update


@pytest.mark.slow
@pytest.mark.parametrize("parameters", ["float32", "same"])
@pytest.mark.parametrize("dtype", HALF)
def test_no_worse_than_eager_in_the_same_dtype(dtype, parameters):
    """The bound of the design: 1.5 x the eager computation's own error against float64, y and every gradient. The
    routing is kept, so that both compute the same function. Root mean squares, since a largest error is luck."""
    layer = make_layer(320, 192, bias=False, dtype=torch.float32, num_factors=16, r=4)
    layer.base_layer.to(dtype)
    if parameters == "same":
        layer.adapter.to(dtype)
    x, weight = make_input(4, 65, 320, dtype=dtype), make_input(4, 65, 192, seed=9, dtype=dtype).detach()
    _, routing = layer(x, return_routing=True)
    context = mk.RoutingContext(routing=routing.detach())
    inputs = [x, layer.adapter.lora_A, layer.adapter.lora_B]

    def errors(y):
        values = [y, *torch.autograd.grad((y * weight).sum(), inputs)]
        return [((v.double() - t).square().mean() / t.square().mean()).sqrt().item() for v, t in zip(values, truth)]

    precise = make_layer(320, 192, bias=False, num_factors=16, r=4)
    precise.load_state_dict(layer.state_dict())
    x64 = x.detach().double().requires_grad_()
    y64 = eager(x64, precise, routing)
    truth = [y64, *torch.autograd.grad(
        (y64 * weight).sum(), [x64, precise.adapter.lora_A, precise.adapter.lora_B])]  # fmt: skip
    for ours, theirs in zip(errors(layer(x, context)), errors(eager(x, layer, routing))):
        assert ours <= 1.5 * theirs


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("masked", [False, True])
def test_routing_is_computed_in_float32(dtype, masked):
    """The same choice and probabilities as for the same numbers in float32; half precision would differ by 1e-3."""
    layer, x = make_layer(320, 8, dtype=torch.float32, num_factors=64, r=8), make_input(8, 300, 320, dtype=dtype)
    context = mk.RoutingContext(mask=torch.rand(8, 300) < 0.5) if masked else None
    layer.base_layer.to(dtype)
    _, half = layer(x, context, return_routing=True)
    layer.base_layer.float()
    _, single = layer(x.float(), context, return_routing=True)
    assert half.probs_a.dtype == torch.float32 and half.gate.dtype == torch.float32
    assert torch.equal(half.index_a, single.index_a) and torch.equal(half.index_b, single.index_b)
    assert relative_error(half.probs_a, single.probs_a) < 1e-5
    assert relative_error(half.probs_b, single.probs_b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_dtypes_of_results_and_gradients(dtype):
    layer = make_layer(dtype=torch.float32 if dtype in HALF else dtype, gate="weighted")
    layer.base_layer.to(dtype)
    y, routing, gradients = run(layer, make_input(3, 5, 12, dtype=dtype))
    assert y.dtype == dtype and gradients["x"].dtype == dtype
    assert all(gradients[f"adapter.{n}"].dtype == p.dtype for n, p in layer.adapter.named_parameters())
    assert routing.probs_a.dtype == routing.gate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert routing.index_a.dtype == torch.int64


def test_autocast_computes_as_if_x_and_the_base_were_cast():
    layer, x = make_layer(64, 48, dtype=torch.float32), make_input(3, 5, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing, gradients = run(layer, x)
        assert torch.is_autocast_enabled("cpu")
    assert y.dtype == torch.bfloat16 and gradients["x"].dtype == torch.float32
    layer.base_layer.to(torch.bfloat16)
    expected, expected_routing, expected_gradients = run(layer, x.detach().bfloat16().requires_grad_())
    assert torch.equal(y, expected) and torch.equal(routing.index_b, expected_routing.index_b)
    for name, gradient in expected_gradients.items():
        assert torch.equal(gradients[name], gradient.to(gradients[name].dtype)), name


def test_autocast_leaves_float64_alone():
    layer, x = make_layer(), make_input(3, 5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), make_layer()(x))


def test_backward_under_autocast_is_the_backward_outside():
    layer, x = make_layer(dtype=torch.float32), make_input(3, 5, 12, dtype=torch.float32)
    outside = torch.autograd.grad(layer(x).square().sum(), [x, layer.adapter.lora_A])
    y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(y.square().sum(), [x, layer.adapter.lora_A])
    assert all(torch.equal(a, b) for a, b in zip(inside, outside))


@pytest.mark.parametrize("form", ["rows", "masked", "packed", "float16"])
def test_a_long_mean_of_equal_tokens_is_the_token(form):
    """A running sum of 20,000 float32 numbers would be wrong in the fifth digit, and shift every probability."""
    L, kind = 20_000, torch.float16 if form == "float16" else torch.float32
    token = (0.1 + 0.01 * torch.arange(16.0)).to(kind)
    x = token.expand(1, L, 16).contiguous()
    torch.manual_seed(0)
    layer = mk.MixLoRALinear(16, 12, mk.MixLoRAConfig(r=4, num_factors=16), dtype=kind)
    with torch.no_grad():
        layer.adapter.router_A.normal_()
    context = None
    if form == "masked":
        x = torch.cat((x, torch.zeros(1, 1, 16)), 1)
        context = mk.RoutingContext(torch.arange(L + 1)[None] < L)
    elif form == "packed":
        context = mk.RoutingContext(cu_seqlens=torch.tensor([0, L]))
    _, routing = layer(x, context, return_routing=True)
    wanted = torch.softmax(layer.adapter.router_A.double() @ token.double(), 0)
    assert relative_error(routing.probs_a[0], wanted) <= 1e-6


def test_the_gates_gradient_of_a_long_instance():
    """A sum over tokens, packed as in rows."""
    L, found = 20_000, []
    layer = make_layer(dtype=torch.float32)
    x = make_input(1, 1, 12, dtype=torch.float32).detach().expand(1, L, 12).contiguous()
    for context in (None, mk.RoutingContext(cu_seqlens=torch.tensor([0, L]))):
        y = layer(x, context)
        found.append(torch.autograd.grad(y.sum(), layer.adapter.router_A)[0])
    assert relative_error(*found) <= 1e-6
