"""Routing: ties, indices that are always valid, and the gradients of every gate against the torch backend."""

import pytest
import torch

from mixlora_kernels.backends import torch as plain
from mixlora_kernels.routing import Instances

from ..cases import relative_error

kernels = pytest.importorskip("mixlora_kernels.backends.triton")

# Softmaxes of at most 128 elements in float32, their exponentials good to a few units in the last place.
CLOSE = 1e-5


def draw(*shape, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("gate", ["straight_through", "binary", "weighted"])
@pytest.mark.parametrize(
    "B, E, r, conditioned", [(3, 7, 3, True), (2, 128, 64, False), (5, 16, 16, False), (1, 1, 1, True)]
)
def test_as_the_torch_backend(B, E, r, conditioned, gate, device):
    logits, instances = draw(B, 2 * E, device=device), Instances(B, 4)
    table = draw(r, E, E, device=device, seed=1) if conditioned else None
    results = []
    for backend in (kernels, plain):
        *routing, saved = backend.route(logits, table, r, gate, instances)
        index_a, index_b, _, probs_a, probs_b = routing
        dgate, *dprobs = (draw(B, n, device=device, seed=n) for n in (r, E, E + 1))
        dprobs[1] = dprobs[1][:, :E]
        backward = backend.route_backward(dgate, *dprobs, index_a, index_b, probs_a, probs_b, saved, gate)
        results.append((routing, backward))
    (routing, backward), (routing0, backward0) = results
    assert torch.equal(routing[0], routing0[0]) and torch.equal(routing[1], routing0[1])
    for ours, theirs in zip((*routing[2:], *backward), (*routing0[2:], *backward0)):
        assert (ours is None) == (theirs is None)
        assert ours is None or relative_error(ours, theirs, 1e-6) <= CLOSE


def test_ties_go_to_the_lower_index(device):
    """Equal logits everywhere, and pairs of equal ones among others."""
    logits = torch.zeros(2, 14, device=device)
    logits[1] = torch.tensor([0, 2, 1, 2, 1, 0, 2, 5, 0, 5, 0, 5, 5, 5.0], device=device)
    index_a, index_b, *_ = kernels.route(logits, None, 4, "binary", Instances(2, 1))
    assert index_a.tolist() == [[0, 1, 2, 3], [1, 3, 6, 2]]
    assert index_b.tolist() == [[0, 1, 2, 3], [0, 2, 4, 5]]


def test_indices_are_valid_whatever_the_logits(device):
    """A step whose activations overflowed must not read beyond the pool: an index is in range, and none is twice."""
    logits = draw(3, 14, device=device)
    logits[0, 3], logits[1], logits[2, :7] = float("nan"), float("nan"), float("-inf")
    for table in (None, draw(4, 7, 7, device=device)):
        for index in kernels.route(logits, table, 4, "weighted", Instances(3, 1))[:2]:
            assert ((index >= 0) & (index < 7)).all()
            assert all(len(set(row)) == 4 for row in index.tolist())


def test_the_mean_is_over_the_pooled_tokens_of_every_tile(device):
    """The logits that the sums of project stand for, by the probabilities they lead to."""
    B, L, D, E = 2, 37, 40, 5
    x, lora_A, routers = (draw(n, D, device=device, seed=n) for n in (B * L, E, 2 * E))
    mask = (draw(B * L, device=device, seed=9) > 0).to(device)
    cu_seqlens = torch.tensor([0, 20, B * L], device=device)
    segment = (torch.arange(B * L, device=device) >= 20).long()
    for instances in (Instances(B, L, mask=mask), Instances(B, L), Instances(B, None, cu_seqlens, segment, mask)):
        _, sums, _ = kernels.project(x, lora_A, routers, instances, None, 0.0)
        _, logits, _ = plain.project(x, lora_A, routers, instances, None, 0.0)
        probabilities = kernels.route(sums, None, 2, "binary", instances)[3:5]
        expected = plain.route(logits, None, 2, "binary", instances)[3:5]
        assert all(relative_error(a, b) <= CLOSE for a, b in zip(probabilities, expected))
