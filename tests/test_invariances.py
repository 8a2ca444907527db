"""What must not matter does not: padding, packing, the order of the batch, the neighbours in it."""

import pytest
import torch

import mixlora_kernels as mk
from mixlora_kernels.backends.eager.rank_r import TOKENS

from .cases import assert_same, make_input, make_layer, make_mask, relative_error, run

EXACT = 1e-12  # float64 sums in another order
BACKENDS = ["torch", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("left, right", [(0, 3), (4, 0), (2, 5), (0, 200)])
def test_padding_changes_nothing(backend, left, right):
    """Outputs at the real tokens and every gradient; what stands in the padding is large."""
    layer, x = make_layer(backend=backend), make_input(3, 6, 12)
    y, routing, gradients = run(layer, x)
    padded = torch.full((3, left + 6 + right, 12), 1e3, dtype=torch.float64)
    padded[:, left : left + 6] = x.detach()
    padded.requires_grad_()
    mask = torch.zeros(padded.shape[:2], dtype=torch.int64)
    mask[:, left : left + 6] = 1
    y_padded, routing_padded = layer(padded, mk.RoutingContext(mask=mask), return_routing=True)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    names = [name for name in gradients if name != "x"]
    loss = (y_padded[:, left : left + 6] * weight).sum()
    values = torch.autograd.grad(loss, [padded, *(layer.get_parameter(n) for n in names)])
    assert values[0][:, :left].abs().sum() == 0 and values[0][:, left + 6 :].abs().sum() == 0
    gradients_padded = dict(zip(["x", *names], [values[0][:, left : left + 6], *values[1:]]))
    assert_same((y_padded[:, left : left + 6], routing_padded, gradients_padded), (y, routing, gradients), EXACT)


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [6, 300])
def test_what_stands_in_the_padding_may_be_anything(tokens, rubbish):
    layer, x = make_layer(), make_input(3, tokens, 12).detach()
    mask = make_mask(3, tokens)
    expected = layer(x, mk.RoutingContext(mask=mask))
    spoilt = torch.where(mask[..., None], x, rubbish)
    actual = layer(spoilt, mk.RoutingContext(mask=mask))
    assert torch.equal(actual[mask], expected[mask])


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_separate(backend):
    layer, lengths = make_layer(backend=backend), [3, 1, 7]
    pieces = [make_input(length, 12, seed=length) for length in lengths]
    cu_seqlens = torch.tensor([0, 3, 4, 11], dtype=torch.int32)
    packed = torch.cat(pieces).detach().requires_grad_()
    y, routing = layer(packed, mk.RoutingContext(cu_seqlens=cu_seqlens), return_routing=True)
    assert y.shape == (11, 9)
    gradients = torch.autograd.grad(y.square().sum(), [packed, *layer.adapter.parameters()])
    alone = [layer(piece, return_routing=True) for piece in pieces]
    alone_gradients = torch.autograd.grad(
        sum(out.square().sum() for out, _ in alone), [*pieces, *layer.adapter.parameters()]
    )
    assert relative_error(y, torch.cat([out for out, _ in alone])) < EXACT
    assert torch.equal(routing.index_a, torch.cat([r.index_a for _, r in alone]))
    assert torch.equal(routing.index_b, torch.cat([r.index_b for _, r in alone]))
    assert relative_error(gradients[0], torch.cat(alone_gradients[:3])) < EXACT
    for actual, expected in zip(gradients[1:], alone_gradients[3:]):
        assert relative_error(actual, expected) < EXACT


def test_packed_as_one_row_equals_packed_as_tokens():
    layer, x, cu = make_layer(), make_input(8, 12), torch.tensor([0, 3, 8])
    flat = layer(x, mk.RoutingContext(cu_seqlens=cu, mask=torch.ones(8) > 0))
    row = layer(x[None], mk.RoutingContext(cu_seqlens=cu, mask=torch.ones(1, 8) > 0))
    assert row.shape == (1, 8, 9) and torch.equal(row[0], flat)


def test_permuting_the_batch_permutes_the_result():
    layer, x, mask = make_layer(), make_input(5, 6, 12), make_mask(5, 6)
    order = torch.tensor([3, 0, 4, 2, 1])
    y, routing, gradients = run(layer, x, mk.RoutingContext(mask=mask))
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    moved = x.detach()[order].requires_grad_()
    y_moved, routing_moved = layer(moved, mk.RoutingContext(mask=mask[order]), return_routing=True)
    values = torch.autograd.grad((y_moved * weight[order]).sum(), [moved, *layer.adapter.parameters()])
    gradients_moved = dict(zip(gradients, values))
    expected_routing = mk.Routing(*(t[order] for t in routing))
    expected = (y[order], expected_routing, gradients | {"x": gradients["x"][order]})
    assert_same((y_moved, routing_moved, gradients_moved), expected, EXACT)


def test_an_instance_does_not_see_its_neighbours():
    layer, x = make_layer(), make_input(3, 6, 12).detach()
    expected = layer(x)[1]
    x[0], x[2] = float("nan"), float("inf")
    assert torch.equal(layer(x)[1], expected)


@pytest.mark.parametrize("layout", ["rows", "masked", "packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_does_not_see_the_neighbours(layout, backend):
    """x's gradient, of which a part comes through the mean of the instance: masked tokens have no such part."""
    layer, x, mask = make_layer(backend=backend), make_input(3, 6, 12).detach(), make_mask(3, 6)
    context = {
        "rows": mk.RoutingContext(),
        "masked": mk.RoutingContext(mask=mask),
        "packed": mk.RoutingContext(cu_seqlens=torch.tensor([0, 6, 12, 18]), mask=mask.reshape(1, 18)),
    }[layout]

    def gradient(first, last):
        spoilt = x.clone()
        spoilt[0, mask[0].nonzero()[0]], spoilt[2] = first, last
        spoilt.requires_grad_()
        y = layer(spoilt.reshape(1, 18, 12) if layout == "packed" else spoilt, context)
        return torch.autograd.grad(y.sum(), spoilt)[0]

    expected, actual = gradient(1.0, 1.0), gradient(float("inf"), float("nan"))
    assert torch.equal(actual[1], expected[1]) and expected[1].abs().min() > 0
    assert actual[0].isnan().any()


def test_one_instance_may_come_without_a_batch_dimension():
    layer, x = make_layer(), make_input(6, 12)
    assert torch.equal(layer(x), layer(x[None])[0])
    mask = make_mask(1, 6)
    expected = layer(x[None], mk.RoutingContext(mask=mask))[0]
    for given in (mask, mask[0]):
        assert torch.equal(layer(x, mk.RoutingContext(mask=given)), expected)


def test_more_dimensions_are_tokens_too():
    layer, x = make_layer(), make_input(2, 3, 4, 12)
    assert torch.equal(layer(x), layer(x.reshape(2, 12, 12)).reshape(2, 3, 4, 9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_zero_lora_b_gives_the_bases_output_bit_for_bit(dtype, bias):
    layer = mk.MixLoRALinear(33, 65, mk.MixLoRAConfig(), bias=bias, dtype=dtype)
    x = torch.randn(4, 19, 33, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_all_factors_chosen_is_plain_lora_of_rank_e_when_the_pairing_is_undone():
    """r = E: every factor is chosen; slot i pairs the i-th most probable of A with the i-th of B."""
    layer, x = make_layer(num_factors=5, r=5), make_input(3, 4, 12)
    y, routing = layer(x, return_routing=True)
    assert routing.index_a.sort(-1).values.tolist() == [list(range(5))] * 3
    adapter, base = layer.adapter, layer.base_layer(x)
    for b in range(3):
        dense = layer.config.scaling * adapter.lora_B[routing.index_b[b]].T @ adapter.lora_A[routing.index_a[b]]
        assert relative_error(y[b], base[b] + x[b] @ dense.T) < EXACT


@pytest.mark.parametrize("conditioning", ["factors", "none"])
@pytest.mark.parametrize("tokens", [6, 4 * TOKENS])
def test_a_factor_that_nobody_chose_has_an_exactly_zero_gradient(conditioning, tokens):
    """By products with the whole pool, and by gathered rows, which instances of many tokens take."""
    layer = make_layer(num_factors=11, r=2, conditioning=conditioning)
    _, routing, gradients = run(layer, make_input(3, tokens, 12))
    for name, index in (("lora_A", routing.index_a), ("lora_B", routing.index_b)):
        chosen = torch.zeros(11, dtype=torch.bool)
        chosen[index.flatten()] = True
        gradient = gradients[f"adapter.{name}"]
        assert (gradient[~chosen] == 0).all() and not chosen.all()
        assert (gradient[chosen] != 0).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_index(backend, dtype):
    """Router rows of zeros give equal probabilities; the factors must come in order of their index."""
    layer = make_layer(70, dtype=dtype, backend=backend, num_factors=33, r=9, conditioning="none")
    row = layer.adapter.router_B[20].detach().clone()
    with torch.no_grad():
        layer.adapter.router_A.zero_()
        layer.adapter.router_B.zero_()[20] = row  # a logit apart from the rest: first or last
    x = make_input(7, 6, 70, dtype=dtype)
    _, routing = layer(x, return_routing=True)
    assert routing.index_a.tolist() == [list(range(9))] * 7
    first = (x.mean(1) @ row > 0).tolist()
    assert routing.index_b.tolist() == [[20, *range(8)] if it else list(range(9)) for it in first]
    assert len(set(first)) == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_of_a_router_tie_up_to_rounding(backend):
    """A sum of 70 products in float32 is off by at most 70 * 6e-8 of the sum of their sizes."""
    layer = make_layer(70, dtype=torch.float32, backend=backend, num_factors=33, conditioning="none")
    with torch.no_grad():
        layer.adapter.router_A[16:32] = layer.adapter.router_A[:16]
    x = make_input(7, 6, 70, dtype=torch.float32)
    probs = layer(x, return_routing=True)[1].probs_a
    size = (x.mean(1).abs() @ layer.adapter.router_A.abs().T).max()
    assert (probs[:, 16:32] / probs[:, :16]).log().abs().max() <= 2 * 70 * 6e-8 * size
