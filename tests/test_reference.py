"""The reference against independent statements of the paper's equations and of the released code."""

from pathlib import Path

import torch

from mixlora_kernels import reference


def test_update_is_a_sum_of_outer_products():
    """Equation 4: ΔW = Σ b_i ⊗ a_i over the chosen pairs."""
    torch.manual_seed(0)
    h, A, B, gate = torch.randn(5, 6), torch.randn(3, 6), torch.randn(3, 4), torch.rand(3)
    dense = sum(gate[i] * torch.outer(B[i], A[i]) for i in range(3))
    torch.testing.assert_close(reference.update(h, A, B, gate), h @ dense.T)


def test_conditional_router_by_hand():
    """Equation 7 with numbers that can be followed: two slots, two factors."""
    A = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    router_AB = torch.tensor([[[0.0, 9.0], [0.0, 9.0]], [[9.0, 0.0], [9.0, 0.5]]])
    # slot 0 sees logits (0, 0), slot 1 sees logits (0, 1)
    one = torch.e / (1 + torch.e)
    expected = torch.tensor([0.5 + 1 - one, 0.5 + one])
    torch.testing.assert_close(reference.conditional(A, router_AB), expected)


def test_published_conditioning_is_the_released_einsum():
    """The released code sums d and f apart: 'brd,rfe->bre'."""
    torch.manual_seed(0)
    A, router_AB = torch.randn(3, 6), torch.randn(3, 7, 6)
    logits = torch.einsum("brd,rfe->bre", A[None], router_AB.mT)[0]
    torch.testing.assert_close(reference.conditional_published(A, router_AB), torch.softmax(logits, -1).sum(0))


def test_ties_go_to_the_lower_index():
    assert reference.top_r(torch.tensor([0.1, 0.3, 0.3, 0.0, 0.3]), 3).tolist() == [1, 2, 4]


def test_order_is_by_probability_not_by_index():
    assert reference.top_r(torch.tensor([0.1, 0.2, 0.4, 0.3]), 2).tolist() == [2, 3]


def test_gates():
    a, b = torch.tensor([0.5, 0.25], requires_grad=True), torch.tensor([0.6, 0.2], requires_grad=True)
    assert reference.gates("binary", a, b).tolist() == [1, 1]
    straight = reference.gates("straight_through", a, b)
    assert straight.tolist() == [1, 1]
    da, db = torch.autograd.grad((straight * torch.tensor([2.0, 3.0])).sum(), (a, b))
    assert da.tolist() == [2, 3] and db.tolist() == [2, 3]
    torch.testing.assert_close(reference.gates("weighted", a, b), torch.tensor([2 / 3 * 0.75, 1 / 3 * 0.25]))
    torch.testing.assert_close(reference.gates("normalized", a, b), torch.tensor([4 / 3 * 1.5, 2 / 3 * 0.5]))


def test_gates_of_tied_pairs_count_one_probability():
    a = torch.tensor([0.5, 0.25], requires_grad=True)
    straight = reference.gates("straight_through", a)
    (da,) = torch.autograd.grad((straight * torch.tensor([2.0, 3.0])).sum(), a)
    assert straight.tolist() == [1, 1] and da.tolist() == [2, 3]
    torch.testing.assert_close(reference.gates("weighted", a), torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(reference.gates("normalized", a), torch.tensor([4 / 3, 2 / 3]))


def test_normalized_is_a_softmax_over_the_chosen_logits_with_a_mean_of_one():
    torch.manual_seed(0)
    pooled, lora_A, router_A = torch.randn(6), torch.randn(7, 6), torch.randn(7, 6)
    index_a, index_b, gate, p_a, p_b = reference.route(
        pooled, lora_A, router_A, None, None, r=3, conditioning="tied", gate="normalized"
    )
    torch.testing.assert_close(gate, 3 * torch.softmax((router_A @ pooled)[index_a], -1))
    assert torch.equal(index_a, index_b) and torch.equal(p_a, p_b)


def test_masked_average():
    h = torch.tensor([[1.0, 2.0], [3.0, 4.0], [float("nan"), 0.0]])
    assert reference.average(h, torch.tensor([1, 1, 0])).tolist() == [2, 3]


def test_imports_nothing_of_the_package():
    source = Path(reference.__file__).read_text(encoding="utf-8")
    assert "from ." not in source and "import mixlora" not in source
