"""MixLoRALinear as a module: construction, copies, moves, saving, and any frozen base."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mixlora_kernels as mk

from .cases import assert_same, make_input, make_layer, relative_error, run, trained


def test_parameters_are_those_of_the_paper():
    layer = mk.MixLoRALinear(12, 9, mk.MixLoRAConfig(r=3, num_factors=7), bias=True, dtype=torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in layer.adapter.named_parameters()}
    assert shapes == {"lora_A": (7, 12), "lora_B": (7, 9), "router_A": (7, 12), "router_B": (7, 12),
                      "router_AB": (3, 7, 12)}  # fmt: skip
    assert all(p.dtype == torch.float32 and p.requires_grad for p in layer.adapter.parameters())
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in layer.base_layer.parameters())


def test_routers_exist_where_they_are_read_and_train_where_they_learn():
    for settings, names in [
        ({"routing": "random"}, set()),
        ({"conditioning": "none"}, {"router_A", "router_B"}),
        ({"routing": "task", "task_dim": 5}, {"router_A", "router_B", "router_AB"}),
    ]:
        adapter = mk.MixLoRALinear(12, 9, mk.MixLoRAConfig(**settings)).adapter
        assert {n for n, _ in adapter.named_parameters() if n.startswith("router")} == names
    assert adapter.router_A.shape == (16, 5) and adapter.router_AB.shape == (4, 16, 12)
    binary = mk.MixLoRALinear(12, 9, mk.MixLoRAConfig(gate="binary"))
    assert set(trained(binary)) == {"adapter.lora_A", "adapter.lora_B"}


@pytest.mark.parametrize("gate", ["straight_through", "binary", "weighted"])
def test_every_trained_parameter_gets_a_gradient(gate):
    """Distributed training and PEFT both count on it."""
    layer = make_layer(gate=gate)
    _, _, gradients = run(layer, make_input(2, 3, 12))
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())


def test_initialisation():
    """lora_B zero; the rest uniform within 1 / sqrt(fan-in), as nn.Linear has it; router_AB's fan-in is r d_in."""
    adapter = mk.MixLoRALinear(400, 9, mk.MixLoRAConfig(r=4, num_factors=16)).adapter
    assert (adapter.lora_B == 0).all()
    for name, fan_in in (("lora_A", 400), ("router_A", 400), ("router_B", 400), ("router_AB", 1600)):
        values, bound = getattr(adapter, name), fan_in**-0.5
        assert bound * 0.99 < values.abs().max() <= bound
        assert abs(values.std().item() / (bound / 3**0.5) - 1) < 0.02  # 6400 draws or more


def test_scaling():
    assert mk.MixLoRAConfig(r=4, num_factors=16).scaling == 8.0  # alpha = 2 E, Appendix B
    assert mk.MixLoRAConfig(r=4, alpha=2).scaling == 0.5
    layer, x = make_layer(alpha=3.0), make_input(2, 3, 12)
    update = layer(x) - layer.base_layer(x)
    doubled = make_layer(alpha=6.0)
    assert relative_error(doubled(x) - doubled.base_layer(x), 2 * update) < 1e-12


def test_published_settings():
    config = mk.MixLoRAConfig.published(r=2, num_factors=8, dropout=0.05)
    assert (config.gate, config.conditioning, config.pool, config.decode) == ("binary", "published", "all", "token")
    assert (config.r, config.num_factors, config.dropout) == (2, 8, 0.05)


def test_from_linear_keeps_and_freezes_the_layer():
    linear = nn.Linear(12, 9)
    layer = mk.MixLoRALinear.from_linear(linear, mk.MixLoRAConfig(r=2))
    assert layer.base_layer is linear and not linear.weight.requires_grad and not linear.bias.requires_grad
    assert (layer.in_features, layer.out_features) == (12, 9)
    x = torch.randn(2, 3, 12)
    assert torch.equal(layer(x), linear(x))


def test_from_linear_follows_the_layers_mode_and_precision():
    layer = mk.MixLoRALinear.from_linear(nn.Linear(12, 9, dtype=torch.float64).eval())
    assert not layer.training and not layer.adapter.training and layer.adapter.lora_A.dtype == torch.float64


class Quadratic(nn.Module):
    """A base that is no nn.Linear, whose backward needs its own output, and which knows no sizes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 9, dtype=torch.float64)

    def forward(self, x):
        return self.linear(x).sigmoid()


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    linear = nn.Linear(12, 9, dtype=torch.float64)
    linear.register_forward_hook(lambda module, args, output: output + 1)
    return linear


@pytest.mark.parametrize("make", [Quadratic, lambda: Scaled(12, 9, dtype=torch.float64), hooked])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_any_base_is_called_and_keeps_its_gradient(make, backend):
    base, like = make(), make_layer()
    layer = mk.MixLoRALinear.from_linear(base, like.config, in_features=12, out_features=9, backend=backend)
    layer.adapter.load_state_dict(like.adapter.state_dict())
    x = make_input(2, 3, 12)
    y, _, gradients = run(layer, x)
    expected_update, _, expected = run(like, x)
    expected_update = expected_update - like.base_layer(x)
    assert relative_error(y, base(x) + expected_update) < 1e-12
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    through_base = torch.autograd.grad((base(x) * weight).sum(), x)[0]
    through_update = expected["x"] - weight @ like.base_layer.weight
    assert relative_error(gradients["x"], through_base + through_update) < 1e-12
    assert relative_error(gradients["adapter.router_AB"], expected["adapter.router_AB"]) < 1e-12


def test_a_base_that_returns_its_input_is_not_written_to():
    layer = mk.MixLoRALinear.from_linear(nn.Identity(), make_layer(12, 12).config, in_features=12, out_features=12)
    layer.double().adapter.load_state_dict(make_layer(12, 12).adapter.state_dict())
    x = make_input(2, 3, 12)
    before = x.detach().clone()
    layer(x).sum().backward()
    assert torch.equal(x.detach(), before)


def test_a_base_that_was_unfrozen_gets_its_gradient():
    layer = make_layer()
    layer.base_layer.requires_grad_(True)
    x, weight = make_input(2, 3, 12), torch.randn(2, 3, 9, dtype=torch.float64)
    (layer(x) * weight).sum().backward()
    assert relative_error(layer.base_layer.weight.grad, torch.einsum("blo,bld->od", weight, x)) < 1e-12
    assert relative_error(layer.base_layer.bias.grad, weight.sum((0, 1))) < 1e-12


def test_several_adapters_on_one_base_add_up():
    first, second = make_layer(seed=1), make_layer(seed=2)
    x = make_input(2, 3, 12)
    y, _ = second.adapter(x, first(x))
    expected = first(x) + second(x) - second.base_layer(x)
    assert relative_error(y, expected) < 1e-12


def test_state_dict_round_trip():
    layer, other = make_layer(seed=1), make_layer(seed=2)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(run(other, make_input(2, 3, 12)), run(layer, make_input(2, 3, 12)), 0.0)


def test_deepcopy_is_equal_and_apart():
    layer = make_layer()
    twin = copy.deepcopy(layer)
    assert_same(run(twin, make_input(2, 3, 12)), run(layer, make_input(2, 3, 12)), 0.0)
    with torch.no_grad():
        twin.adapter.lora_B.zero_()
    assert layer.adapter.lora_B.abs().sum() > 0


def test_meta_device_then_real():
    layer = mk.MixLoRALinear(12, 9, mk.MixLoRAConfig(r=3, num_factors=7), bias=True, device="meta", dtype=torch.float64)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(2, 3, 12, device="meta", dtype=torch.float64)).shape == (2, 3, 9)
    like = make_layer()
    layer.to_empty(device="cpu").load_state_dict(like.state_dict())
    assert_same(run(layer, make_input(2, 3, 12)), run(like, make_input(2, 3, 12)), 0.0)
    layer.adapter.reset_parameters()
    assert (layer.adapter.lora_B == 0).all() and layer.adapter.router_AB.abs().max() <= 36**-0.5


def test_to_moves_everything_to_a_dtype():
    layer = make_layer().to(torch.float32)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert layer(make_input(2, 3, 12, dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("settings", [{"dropout": 0.4}, {"routing": "random"}], ids=str)
def test_checkpointing_recomputes_the_same(reentrant, settings):
    """What is drawn at random comes from torch's generator, whose state checkpointing restores."""
    layer, x = make_layer(**settings), make_input(2, 70, 12)
    torch.manual_seed(3)
    layer(x).square().sum().backward()
    expected = [x.grad, *(p.grad for p in trained(layer).values())]
    x.grad = None
    layer.zero_grad()
    torch.manual_seed(3)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    for actual, plain in zip([x.grad, *(p.grad for p in trained(layer).values())], expected):
        assert torch.equal(actual, plain)


def test_two_forwards_before_a_backward():
    layer = make_layer(dropout=0.3)
    first, second = make_input(2, 5, 12, seed=1), make_input(3, 4, 12, seed=2)
    expected = []
    for seed, x in ((1, first), (2, second)):
        torch.manual_seed(seed)
        expected.append(torch.autograd.grad(layer(x).square().sum(), layer.adapter.lora_A)[0])
    losses = []
    for seed, x in ((1, first), (2, second)):
        torch.manual_seed(seed)
        losses.append(layer(x).square().sum())
    for loss, gradient in zip(losses, expected):
        assert torch.equal(torch.autograd.grad(loss, layer.adapter.lora_A)[0], gradient)


def test_the_result_may_be_changed_in_place():
    layer, x = make_layer(), make_input(2, 3, 12)
    y = layer(x)
    y += 1
    y.mul_(2)
    y.sum().backward()
    expected = torch.autograd.grad(((layer(x) + 1) * 2).sum(), x)[0]
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("view", [
    lambda x: x.transpose(0, 1), lambda x: x[:, 1:], lambda x: x[::2], lambda x: x[..., 4:16], lambda x: x.flip(0),
], ids=["transposed", "later tokens", "every other", "some columns", "flipped"])  # fmt: skip
def test_strides_do_not_matter(view):
    layer, whole = make_layer(), make_input(4, 6, 20).detach()
    x = view(whole)[..., :12].requires_grad_()
    assert_same(
        run(layer, x), run(layer, x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()), 1e-12
    )


def test_an_empty_batch_gives_an_empty_result():
    layer = make_layer()
    y, routing = layer(torch.empty(0, 5, 12, dtype=torch.float64), return_routing=True)
    assert y.shape == (0, 5, 9) and routing.index_a.shape == (0, 3)


def test_frozen_adapters_still_pass_the_gradient_to_x():
    layer, x = make_layer(), make_input(2, 3, 12)
    _, _, expected = run(layer, x)
    layer.requires_grad_(False)
    _, _, actual = run(layer, x)
    assert actual.keys() == {"x"} and relative_error(actual["x"], expected["x"]) < 1e-12


def test_only_one_parameter_trained_at_a_time():
    layer, x = make_layer(), make_input(2, 3, 12)
    _, _, expected = run(layer, x)
    for name, parameter in layer.adapter.named_parameters():
        layer.requires_grad_(False)
        parameter.requires_grad_(True)
        _, _, actual = run(layer, x.detach())
        assert actual.keys() == {f"adapter.{name}"}
        assert relative_error(actual[f"adapter.{name}"], expected[f"adapter.{name}"]) < 1e-12


def test_backend_by_assignment():
    layer = make_layer()
    assert layer.backend is None
    layer.backend = "reference"
    assert layer.adapter.backend == "reference"
    with pytest.raises(ValueError, match="backend must be one of 'reference', 'torch', 'triton' or None, got 'cuda'"):
        layer.backend = "cuda"
    assert layer.backend == "reference"


@pytest.mark.parametrize("tokens", [4, 40])  # each way of adding the update
@pytest.mark.parametrize("fused", [True, False])
def test_an_output_may_be_changed_in_place(fused, tokens):
    """As Falcon adds its residual."""
    layer, x = make_layer(backend="torch"), make_input(2, tokens, 12)
    if not fused:
        layer.base_layer.register_forward_hook(lambda _module, _args, y: None)
    wanted = torch.autograd.grad((layer(x) * 3 + 1).square().sum(), [x, layer.adapter.lora_B])
    y = layer(x)
    y.mul_(3).add_(1)
    got = torch.autograd.grad(y.square().sum(), [x, layer.adapter.lora_B])
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(got, wanted))
