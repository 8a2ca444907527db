"""Dropout: the same elements in forward and backward, the right share of them, nothing read by the routers."""

import pytest
import torch

import mixlora_kernels as mk
from mixlora_kernels.backends.eager.dropout import BLOCK, keep_mask
from mixlora_kernels.dropout import LEVELS, draw_seeds, dropped_levels, keep_scale

from .cases import make_input, make_layer, relative_error, run


def kept(layer, x):
    _, routing = layer(x, return_routing=True)
    return mk.RoutingContext(routing=routing.detach())


@pytest.mark.parametrize("tokens", [1, BLOCK, 2 * BLOCK + 3])
def test_the_backward_drops_what_the_forward_dropped(tokens):
    """With the routing held, the update is linear in lora_A and in x: <gradient, value> = <dy, update> for both.
    A backward that drew another mask, or none, would break it."""
    layer = make_layer(dropout=0.4, bias=False)
    x = make_input(1, tokens, 12)
    context = kept(layer, x)
    y, _, gradients = run(layer, x, context)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    update = ((y - layer.base_layer(x)) * weight).sum()
    through_A = (gradients["adapter.lora_A"] * layer.adapter.lora_A).sum()
    through_x = ((gradients["x"] - weight @ layer.base_layer.weight) * x).sum()
    assert relative_error(through_A, update) < 1e-11  # cancellation among the terms of the sum
    assert relative_error(through_x, update) < 1e-11


@pytest.mark.parametrize("learns", ["lora_B", "lora_A", "router_A", "x lora_B", "x", "x router_B"])
def test_what_is_frozen_changes_no_other_gradient(learns):
    """A part of the adapter is trained; or all is frozen, and passes x's gradient on."""
    layer, x, names = make_layer(dropout=0.4), make_input(2, 6, 12), learns.split()
    _, _, everything = run(layer, x)
    for name, parameter in layer.adapter.named_parameters():
        parameter.requires_grad_(name in names)
    _, _, gradients = run(layer, x.detach().requires_grad_("x" in names))
    assert [name.removeprefix("adapter.") for name in gradients] == names
    for name, gradient in gradients.items():
        assert torch.equal(gradient, everything[name]), name


def test_a_seed_gives_a_mask_and_another_gives_another():
    x = torch.empty(200, 37)
    torch.manual_seed(0)
    first, second = draw_seeds(1, x.device), draw_seeds(1, x.device)
    assert torch.equal(keep_mask(first, x, 0.3), keep_mask(first, x, 0.3))
    assert not torch.equal(keep_mask(first, x, 0.3), keep_mask(second, x, 0.3))
    assert not torch.equal(keep_mask(first, x, 0.3)[:BLOCK], keep_mask(first, x, 0.3)[BLOCK : 2 * BLOCK])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.99])
def test_the_share_that_is_dropped(p):
    """Within five standard deviations of a binomial, over the whole and over every residue of the column modulo 4,
    since one random word serves four elements; and neighbours are not correlated."""
    mask = keep_mask(torch.tensor([7]), torch.empty(4096, 128), p).double()
    deviation = (p * (1 - p)) ** 0.5
    for part in (mask, *(mask[:, i::4] for i in range(4))):
        assert abs(part.mean().item() - (1 - p)) < 5 * deviation / part.numel() ** 0.5
    centred = mask - (1 - p)
    for lag in range(1, 5):
        products = centred[:, lag:] * centred[:, :-lag]
        assert abs(products.mean().item()) < 5 * deviation**2 / products.numel() ** 0.5


def test_the_scale_keeps_the_expectation():
    for p in (1e-6, 0.05, 0.1, 0.999999):
        mask = keep_mask(torch.tensor([7]), torch.empty(64, 4096), p).double()
        assert 0 <= mask.mean() <= 1 and keep_scale(p) >= 1
    assert keep_scale(0.5) == 2.0
    # Of 65536 levels one is dropped, although p is two thirds of a level.
    assert dropped_levels(1e-5) == 1 and keep_scale(1e-5) == LEVELS / (LEVELS - 1)


def test_routing_reads_x_before_dropout():
    layer, x = make_layer(dropout=0.5), make_input(4, 6, 12)
    _, trained = layer(x, return_routing=True)
    _, evaluated = layer.eval()(x, return_routing=True)
    assert torch.equal(trained.probs_a, evaluated.probs_a) and torch.equal(trained.probs_b, evaluated.probs_b)


def test_no_dropout_in_evaluation_and_none_at_zero():
    layer, x = make_layer(dropout=0.5), make_input(4, 6, 12)
    plain = make_layer()
    assert torch.equal(layer.eval()(x), plain(x))
    state = torch.get_rng_state()
    plain(x)
    assert torch.equal(torch.get_rng_state(), state)  # no random number is spent


def test_a_quarter_of_the_updates_survives_on_average():
    """The mean over many masks approaches the update without dropout (the scale is 1 / (1 - p))."""
    layer, x = make_layer(dropout=0.75), make_input(1, 4, 12).detach()
    context = kept(layer, x)
    expected = layer.eval()(x, context) - layer.base_layer(x)
    layer.train()
    rows = x.expand(4000, -1, -1)
    many = mk.RoutingContext(routing=mk.Routing(*(t.expand(4000, -1) for t in context.routing)))
    updates = layer(rows, many) - layer.base_layer(rows)
    error = (updates.mean(0) - expected).abs() / (updates.std(0) / 4000**0.5)
    assert error.max() < 5  # standard errors
