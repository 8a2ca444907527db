"""On a GPU, at the shapes of a 7B model: the kernels against float64, the same bits twice, CUDA graphs, compilation."""

import pytest
import torch

import mixlora_kernels as mk

from ..cases import relative_error

# Full sizes, which Triton's interpreter would take hours for; the same kernels' values are tested in it elsewhere.
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")


@pytest.fixture(autouse=True)
def poisoned():
    """Instead of conftest.py's: the caching allocator is filled with no numbers, at the speed of the device."""
    memory = torch.full((1 << 30,), float("nan"), device="cuda")
    del memory


def make(d_in=4096, d_out=4096, B=16, L=800, dtype=torch.bfloat16, **settings):
    torch.manual_seed(0)
    config = mk.MixLoRAConfig(**{"r": 4, "num_factors": 16, "dropout": 0.05, **settings})
    layer = mk.MixLoRALinear(d_in, d_out, config, device="cuda", dtype=dtype)
    torch.nn.init.normal_(layer.adapter.lora_B, std=0.02)
    return layer, torch.randn(B, L, d_in, device="cuda", dtype=dtype, requires_grad=True)


def step(layer, x, context=None):
    """y, what of the routing is differentiable and all gradients, of which a kept routing leaves the routers none; and
    the routing."""
    torch.manual_seed(1)
    y, routing = layer(x, context, return_routing=True)
    weight = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(2), device="cuda", dtype=y.dtype)
    inputs = [x, *(p for p in layer.adapter.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(y, inputs, weight, allow_unused=True)
    return [y, *routing[2:], *(gradient for gradient in gradients if gradient is not None)], routing


SHAPES = [(4096, 4096, 16, 800), (4096, 11008, 4, 333), (5120, 13824, 1, 4097), (4096, 4096, 3, 17), (100, 77, 5, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("d_in, d_out, B, L", SHAPES)
def test_no_worse_than_eager(d_in, d_out, B, L, dtype):
    """The design's bound: 1.5 x the error of the torch backend in the same dtype, against the torch backend in float64,
    all with the same routing. Root mean squares; 1e-6 more in float32, where both are at rounding."""
    layer, x = make(d_in, d_out, B, L, dtype, dropout=0.0)
    kept = mk.RoutingContext(routing=layer(x, return_routing=True)[1].detach())
    results = {}
    for backend in ("triton", "torch"):
        layer.backend = backend
        results[backend] = step(layer, x, kept)[0]
        assert len(results[backend]) == 4 + 3  # y and the kept routing's; of x, lora_A and lora_B
    layer.backend = "torch"
    layer.double()
    truth = step(layer, x.detach().double().requires_grad_(), kept)[0]
    for ours, theirs, true in zip(results["triton"], results["torch"], truth):
        error, bound = ((t.double() - true).square().mean().sqrt() for t in (ours, theirs))
        assert error <= 1.5 * bound + 1e-6 * true.square().mean().sqrt()


@pytest.mark.parametrize("context", ["rows", "mask", "packed"])
def test_the_torch_backends_routing_and_gradients(context):
    """float32 at a real width, everything differentiable. 1e-4: sums of 4096 and 1600 products, of which both
    backends take their own order, go through a softmax."""
    layer, x = make(4096, 1024, 2, 800, torch.float32, dropout=0.0)
    fields = {
        "rows": mk.RoutingContext(),
        "mask": mk.RoutingContext(mask=torch.arange(1600, device="cuda").view(2, 800) % 3 > 0),
        "packed": mk.RoutingContext(cu_seqlens=torch.tensor([0, 700, 1600], device="cuda")),
    }
    x = x.detach().view(1, 1600, 4096).requires_grad_() if context == "packed" else x
    (ours, routing), layer.backend = step(layer, x, fields[context]), "torch"
    theirs, expected = step(layer, x, fields[context])
    assert torch.equal(routing.index_a, expected.index_a) and torch.equal(routing.index_b, expected.index_b)
    for a, b in zip(ours, theirs):
        assert relative_error(a, b, 1e-6) <= 1e-4


def test_two_runs_give_the_same_bits():
    layer, x = make()
    assert all(torch.equal(a, b) for a, b in zip(step(layer, x)[0], step(layer, x)[0]))


def test_nothing_of_the_size_of_x_is_allocated():
    """Beyond y and dx, and the frozen product's own: the adapter's planes and sums stay below a tenth of x."""
    layer, x = make()
    layer(x).sum().backward()
    size, (y, dy) = x.numel() * x.element_size(), (layer(x), torch.randn_like(x))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(y, [x, *layer.adapter.parameters()], dy)
    assert torch.cuda.max_memory_allocated() - before <= 1.2 * size


def test_a_decode_step_in_a_cuda_graph():
    layer, x = make(B=2, L=1)
    layer.eval()
    with torch.no_grad():
        context = mk.RoutingContext(routing=layer(x, return_routing=True)[1].detach())
        expected = layer(x, context)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x, context)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


def test_a_training_step_in_a_cuda_graph():
    """Nothing asks the device for a value on the way."""
    layer, x = make(B=2, L=100)
    parameters = [x, *layer.adapter.parameters()]

    def once():
        y = layer(x)
        return y, *torch.autograd.grad(y.sum(), parameters)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = once()
    for result in results:
        result.detach().fill_(float("nan"))
    graph.replay()
    for result in results:
        assert result.isfinite().all() and result.abs().sum() > 0


def test_inductor():
    """The frozen product may be another kernel's, in bfloat16: 2 ** -8, times a few for the sums behind it."""
    layer, x = make(B=2, L=100, dropout=0.0)
    expected = step(layer, x)[0]
    compiled = torch.compile(layer, fullgraph=True)
    for ours, theirs in zip(step(compiled, x)[0], expected):
        assert relative_error(ours, theirs, 1e-6) <= 2e-2


# With one device there is no other one that a launch could go to by mistake.
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one():
    layer, x = make(B=2, L=100)
    layer.eval()
    expected = layer(x).cpu()
    layer, x = layer.to("cuda:1"), x.detach().to("cuda:1")
    assert torch.cuda.current_device() == 0 and torch.equal(layer(x).cpu(), expected)
