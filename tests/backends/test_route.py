"""Routing in the kernels: ties, and indices that are always valid."""

import pytest
import torch

from ..cases import relative_error
from .groups import draw

route = pytest.importorskip("mixlora_kernels.backends.kernels.route")


def choose(logits, table, r, gate="straight_through"):
    """index_a, index_b, gate, probs_a, probs_b from logits [2, B, E] of one sibling, and T [R, E, E] or None."""
    (_, B, E), G = logits.shape, 1
    outputs = route.allocate_routing(logits[0], False, G, B, E, r, True, "none" if table is None else "factors")
    index_a, weight, probs_a, _, index_b, probs_b, kept = outputs
    slabs = torch.stack((logits * 0.25, logits * 0.75), 1)[:, None]  # [2, G, slabs, B, E]
    launch = route.plan_route(slabs.shape, r, 0 if table is None else 1, route.gate_total(gate, r))
    launch(
        logits.device, logits=slabs, table=None if table is None else table[None, None], index_a=index_a,
        index_b=index_b, gate=weight, probs_a=probs_a, probs_b=probs_b, kept=kept,
    )  # fmt: skip
    return [t[0] for t in (index_a, index_b, weight, probs_a, probs_b)]


def test_ties_go_to_the_lower_index(device):
    """Equal logits everywhere, and pairs of equal ones among others."""
    a, b = torch.zeros(2, 2, 7, device=device)
    a[1], b[1] = torch.tensor([[0, 2, 1, 2, 1, 0, 2], [5, 0, 5, 0, 5, 5, 5.0]], device=device)
    index_a, index_b, *_ = choose(torch.stack((a, b)), None, 4)
    assert index_a.tolist() == [[0, 1, 2, 3], [1, 3, 6, 2]]
    assert index_b.tolist() == [[0, 1, 2, 3], [0, 2, 4, 5]]


def test_indices_are_valid_whatever_the_logits(device):
    """A step whose activations overflowed must not read beyond the pool: an index is in range, and none is twice."""
    logits = draw(2, 3, 7, device=device)
    logits[0, 0, 3], logits[:, 1], logits[0, 2] = float("nan"), float("nan"), float("-inf")
    for table in (None, draw(4, 7, 7, device=device)):
        for index in choose(logits, table, 4, "weighted")[:2]:
            assert ((index >= 0) & (index < 7)).all()
            assert all(len(set(row)) == 4 for row in index.tolist())


@pytest.mark.parametrize("gate, total", [("weighted", 1.0), ("normalized", 4.0)])
def test_the_gates_of_equal_probabilities(gate, total, device):
    """Each share is total / r, and a pair has the product of two."""
    weight = choose(torch.zeros(2, 1, 7, device=device), None, 4, gate)[2]
    # Four additions and a division of equal numbers: a rounding each.
    assert relative_error(weight, torch.full((1, 4), (total / 4) ** 2)) <= 1e-6
