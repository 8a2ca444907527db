"""What a layer is told beside x may lie in memory as it likes: repeated rows, every second one, transposed. The kernels
index these tensors as if their elements were neighbours."""

import pytest
import torch
from torch.autograd import forward_ad

import mixlora_kernels as mk

from ..cases import TASK_DIM, make_input, make_layer, make_mask, relative_error, run
from .conftest import needs_triton

CLOSE = 1e-5
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element along each dimension of a larger tensor."""
    larger = tensor.new_zeros([2 * size for size in tensor.shape])
    view = larger[(slice(None, None, 2),) * tensor.dim()]
    view.copy_(tensor)
    return view


def check(context, told, backend, device, x, **settings):
    """``told``, the context in another form, gives what ``context`` gives: the output, the routing, all gradients."""
    layer = make_layer(dtype=torch.float32, backend=backend, **settings).to(device)
    x = x.detach().to(device).requires_grad_()
    for mine, other in zip(context, told):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, other) and not other.is_contiguous()
    (y, routing, wanted), (y1, routing1, got) = (run(layer, x, each) for each in (context, told))
    assert torch.equal(y, y1) and torch.equal(routing.index_b, routing1.index_b)
    for name, gradient in wanted.items():
        assert (gradient is None) == (got[name] is None)
        assert gradient is None or torch.equal(gradient, got[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask(backend, device):
    mask = make_mask(1, 19).to(device)
    check(mk.RoutingContext(mask), mk.RoutingContext(strided(mask)), backend, device, make_input(1, 19, 12).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(backend, device):
    mask, starts = make_mask(1, 19)[0].to(device), torch.tensor([0, 3, 11, 19], device=device)
    mask[[0, 3, 11]] = True
    wanted, told = mk.RoutingContext(mask, starts), mk.RoutingContext(strided(mask), strided(starts))
    check(wanted, told, backend, device, make_input(19, 12).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_task_for_all(backend, device):
    task = torch.randn(1, TASK_DIM, generator=torch.Generator().manual_seed(4)).to(device)
    wanted, told = (mk.RoutingContext(task=each) for each in (task.repeat(3, 1), task.expand(3, -1)))
    check(wanted, told, backend, device, make_input(3, 5, 12).float(), routing="task")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["every second row", "one row for all"])
def test_a_kept_routing(backend, form, device):
    """Training, and a decoding step."""
    layer = make_layer(dtype=torch.float32, backend=backend).to(device)
    x = make_input(4, 5, 12).detach().float().to(device)
    _, routing = layer(x, return_routing=True)
    if form == "every second row":
        told = mk.Routing(*(tensor[::2] for tensor in routing.detach()))
    else:
        told = mk.Routing(*(tensor[:1].expand(2, -1) for tensor in routing.detach()))
    wanted, told = (mk.RoutingContext(routing=each) for each in (mk.Routing(*(t.clone() for t in told)), told))
    assert not told.routing.gate.is_contiguous()
    with torch.no_grad():
        token = x[:2, :1]
        assert torch.equal(layer.eval()(token, told), layer(token, wanted))
    layer.train()
    outputs = []
    for context in (wanted, told):
        own = x[:2].clone().requires_grad_()
        y = layer(own, context)
        outputs.append((y, *torch.autograd.grad(y.square().sum(), [own, layer.adapter.lora_A, layer.adapter.lora_B])))
    assert all(map(torch.equal, *outputs))


class ChannelsFirst(torch.nn.Module):
    """A frozen base whose output has its channels first in memory."""

    in_features, out_features = 12, 20

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv1d(12, 20, 1)

    def forward(self, x):
        return self.convolution(x.mT).mT


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bases_output_while_decoding(backend, device):
    torch.manual_seed(0)
    layer = mk.MixLoRALinear.from_linear(ChannelsFirst(), mk.MixLoRAConfig(r=3, num_factors=7)).to(device).eval()
    torch.nn.init.normal_(layer.adapter.lora_B)
    layer.backend, x = backend, torch.randn(1, 3, 12, device=device)
    assert layer.base_layer(x).stride() == (60, 1, 3)
    with torch.no_grad():
        y, routing = layer(x, return_routing=True)
        assert relative_error(layer(x, mk.RoutingContext(routing=routing)), y) < CLOSE


@needs_triton
@pytest.mark.parametrize("what", ["x", "lora_A", "lora_B", "gate"])
def test_forward_mode_is_refused_not_lost(what, device):
    """A kernel would drop the update's tangent."""
    layer = make_layer(dtype=torch.float32, backend="triton").to(device).requires_grad_(False).eval()
    x = make_input(2, 1, 12).detach().float().to(device)
    _, routing = layer(x, return_routing=True)
    varied = {"x": x, "gate": routing.gate, "lora_A": layer.adapter.lora_A, "lora_B": layer.adapter.lora_B}
    base = mk.FrozenLinear(layer.base_layer.weight, layer.base_layer.bias)

    def compute(value, backend):
        x, gate, *pools = ((varied | {what: value})[name] for name in varied)
        factors = mk.Factors(*pools, *layer.adapter.factors[2:])
        context = mk.RoutingContext(routing=mk.Routing(*routing[:2], gate, *routing[3:]))
        return mk.mixlora(x, base, factors, layer.config, context, backend=backend)[0]

    value = varied[what]
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        compute(forward_ad.make_dual(value, torch.ones_like(value)), "triton")
    with forward_ad.dual_level():  # plain torch differentiates it
        y = compute(forward_ad.make_dual(value, torch.ones_like(value)), "torch")
        tangent = forward_ad.unpack_dual(y).tangent
    step = 1e-3
    wanted = (compute(value + step, "torch") - compute(value - step, "torch")) / (2 * step)
    assert relative_error(tangent, wanted) < 1e-3
