"""The load-balancing loss."""

import pytest
import torch

import mixlora_kernels as mk

from .cases import make_input, make_layer


def routing_of(index, probs) -> mk.Routing:
    return mk.Routing(index, index, torch.ones(index.shape), probs, probs)


def test_its_value():
    """Two instances, three factors, two slots: f = (2, 1, 1) / 4, P = (0.5, 0.3, 0.2)."""
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.3, 0.3]], requires_grad=True)
    loss = mk.balance_loss(routing_of(torch.tensor([[0, 1], [0, 2]]), probs))
    assert loss.item() == pytest.approx(3 * (0.5 * 0.5 + 0.25 * 0.3 + 0.25 * 0.2))
    (gradient,) = torch.autograd.grad(loss, probs)
    assert torch.allclose(gradient, torch.tensor([0.5, 0.25, 0.25]).expand(2, 3) * 3 / 2)


def test_it_is_1_where_all_factors_are_alike_and_more_where_few_are_chosen():
    equal = torch.full((4, 4), 0.25)
    assert mk.balance_loss(routing_of(torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]]), equal)).item() == 1.0
    few = torch.tensor([[0.49, 0.49, 0.01, 0.01]] * 4)
    assert mk.balance_loss(routing_of(torch.tensor([[0, 1]] * 4), few)).item() == pytest.approx(4 * 0.49)


@pytest.mark.parametrize("settings", [{}, {"conditioning": "tied", "gate": "normalized"}])
def test_of_a_layer(settings):
    """Both pools count alike, though p_B sums to 2; of a group it is the mean over the siblings; routers learn."""
    layer = make_layer(12, 9, **settings)
    _, routing = layer(make_input(3, 5, 12).detach(), return_routing=True)
    loss = mk.balance_loss(routing)
    parts = [mk.balance_loss(routing_of(routing.index_a, routing.probs_a))]
    if not settings:
        parts.append(mk.balance_loss(routing_of(routing.index_b, routing.probs_b / 2)))
    assert loss.item() == pytest.approx(sum(p.item() for p in parts) / len(parts))
    group = mk.Routing(*(torch.stack((tensor, tensor)) for tensor in routing))
    assert mk.balance_loss(group).item() == pytest.approx(loss.item())
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in layer.adapter.named_parameters() if "router" in n)
