"""Each stage of the kernels against the torch backend's, in float32 and bfloat16, and as adjoints of one another."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from mixlora_kernels.backends import torch as plain
from mixlora_kernels.routing import Instances

from ..cases import make_mask, relative_error

kernels = pytest.importorskip("mixlora_kernels.backends.triton")

# Sums of at most some hundred float32 products in another order: 6e-8 each, and seldom as much as its root in all.
CLOSE = 1e-5


def draw(*shape, device, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def draw_index(B, E, r, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(E, generator=generator)[:r] for _ in range(B)]).to(device)


def make_instances(B, L, packed, masked, device):
    mask = make_mask(B, L).flatten().to(device) if masked else None
    if not packed:
        return Instances(B, L, mask=mask)
    lengths = torch.full((B,), L)
    lengths[0], lengths[-1] = lengths[0] - min(2, L - 1) * (B > 1), lengths[-1] + min(2, L - 1) * (B > 1)
    segment = torch.arange(B).repeat_interleave(lengths)
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    if mask is not None:
        mask[cu_seqlens[:-1]] = True
    return Instances(B, None, cu_seqlens.to(device), segment.to(device), mask)


cases = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "L": st.sampled_from([1, 5, 16, 17, 35]),
        "D": st.sampled_from([1, 31, 32, 70]),
        "E": st.sampled_from([1, 5, 16, 21]),
        "r": st.sampled_from([1, 4, 16, 21]),
        "packed": st.booleans(),
        "masked": st.booleans(),
    }
)
drawn = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@drawn
@given(case=cases)
def test_project(case, device):
    B, L, D, E = (case[k] for k in "BLDE")
    instances = make_instances(B, L, case["packed"], case["masked"], device)
    x, lora_A, routers = (draw(n, D, device=device, seed=n) for n in (B * L, E, 2 * E))
    u, sums, _ = kernels.project(x, lora_A, routers, instances, None, 0.0)
    u0, logits, _ = plain.project(x, lora_A, routers, instances, None, 0.0)
    assert relative_error(u.sum(0), u0) <= CLOSE
    assert relative_error(pool(sums, instances), logits, logits.abs().max().item()) <= CLOSE
    alone, nothing, _ = kernels.project(x, lora_A, None, instances, None, 0.0)
    assert nothing is None and torch.equal(alone, u)


def pool(sums, instances):
    """The logits that the kernels' sums stand for, with the tiles counted one by one."""
    lengths = [instances.length] * instances.count
    if instances.cu_seqlens is not None:
        lengths = instances.cu_seqlens.diff().tolist()
    counts = [-(-length // sums.rows) for length in lengths]  # the tiles left over, where packed, hold nothing
    total = torch.stack([part.sum(0) for part in sums.planes.sum(0)[: sum(counts)].split(counts)])
    return total * instances.share(torch.float32)


@drawn
@given(case=cases)
def test_project_backward(case, device):
    B, L, D, E = (case[k] for k in "BLDE")
    r, N = min(case["r"], E), B * L
    instances = make_instances(B, L, case["packed"], case["masked"], device)
    x, lora_A, routers = (draw(n, D, device=device, seed=n) for n in (N, E, 2 * E))
    index, du = draw_index(B, E, r, device), draw(N, r, device=device, seed=5)
    dlogits, dx = draw(B, 2 * E, device=device, seed=6), draw(N, D, device=device, seed=7)
    everywhere = torch.zeros(N, E, device=device)
    everywhere.scatter_(1, index[instances.index(device)], du)
    share = instances.share(torch.float32)
    expected = plain.project_backward(
        dx.clone(), x, everywhere, lora_A, index, dlogits, routers, plain.project(
            x, lora_A, routers, instances, None, 0.0)[2], instances, None, 0.0, True, True,
    )  # fmt: skip
    actual = kernels.project_backward(
        dx, x, du, lora_A, index, dlogits * share, routers, None, instances, None, 0.0, True, True
    )
    for ours, theirs in zip(actual, expected):
        assert relative_error(ours, theirs) <= CLOSE
    alone, *nothing = kernels.project_backward(
        None, None, du, lora_A, index, None, None, None, instances, None, 0.0, True, False
    )
    assert relative_error(alone, everywhere @ lora_A) <= CLOSE and nothing == [None, None]


@drawn
@given(case=cases, in_place=st.booleans())
def test_expand_and_its_backward(case, in_place, device):
    B, L, O, E = (case[k] for k in "BLDE")
    r, N = min(case["r"], E), B * L
    instances = make_instances(B, L, case["packed"], False, device)
    planes, lora_B, y = (
        draw(2, N, E, device=device),
        draw(E, O, device=device, seed=2),
        draw(N, O, device=device, seed=3),
    )
    index_a, index_b = draw_index(B, E, r, device), draw_index(B, E, r, device, seed=1)
    gate, dy = draw(B, r, device=device, seed=4), draw(N, O, device=device, seed=5)
    given_y = y.clone()
    out, *saved = kernels.expand(given_y, planes, lora_B, index_a, index_b, gate, 2.5, instances, in_place)
    out0, *saved0 = plain.expand(y, planes.sum(0), lora_B, index_a, index_b, gate, 2.5, instances, False)
    assert (out is given_y) == in_place and (in_place or torch.equal(given_y, y))
    assert relative_error(out, out0) <= CLOSE
    chosen, u, weight = saved
    actual = kernels.expand_backward(dy, chosen, u, lora_B, index_a, index_b, weight, 2.5, instances, True, True)
    chosen, u, weight = saved0
    expected = plain.expand_backward(dy, chosen, u, lora_B, index_a, index_b, weight, 2.5, instances, True, True)
    du = expected[0].gather(1, index_a[instances.index(device)])
    for ours, theirs in zip(actual, (du, *expected[1:])):
        assert relative_error(ours, theirs) <= CLOSE
    du, *nothing = kernels.expand_backward(
        dy, None, planes, lora_B, index_a, index_b, gate, 2.5, instances, False, False
    )
    assert torch.equal(du, actual[0]) and nothing == [None, None]


def test_adjoints(device):
    """⟨project(x), g⟩ = ⟨x, projectᵀ(g)⟩ = ⟨lora_A, its gradient⟩, and the same for expand: linear maps and their
    transposes, with the dropout of one call. Compared in float64 sums of float32 results."""
    B, L, D, E, r = 2, 37, 70, 9, 3
    N, instances = B * L, Instances(B, L)
    x, lora_A, lora_B = draw(N, D, device=device), draw(E, D, device=device, seed=1), draw(E, D, device=device, seed=2)
    index_a, index_b = draw_index(B, E, r, device), draw_index(B, E, r, device, seed=1)
    seed, g, gate = (
        torch.tensor([3], device=device),
        draw(N, r, device=device, seed=3),
        draw(B, r, device=device, seed=4),
    )

    def inner(a, b):
        return (a.double() * b.double()).sum()

    u, _, _ = kernels.project(x, lora_A, None, instances, seed, 0.3)
    value = inner(u.sum(0).gather(1, index_a[instances.index(device)]), g)
    dx, dlora_A, _ = kernels.project_backward(
        None, x, g, lora_A, index_a, None, None, None, instances, seed, 0.3, True, True
    )
    size = x.norm() * dx.norm()  # what the inner products' rounding is relative to: they cancel
    assert abs(inner(x, dx) - value) <= CLOSE * size and abs(inner(lora_A, dlora_A) - value) <= CLOSE * size

    dy = draw(N, D, device=device, seed=5)
    update, *_ = kernels.expand(torch.zeros_like(dy), u, lora_B, index_a, index_b, gate, 0.7, instances, True)
    du, dlora_B, dgate = kernels.expand_backward(
        dy, None, u, lora_B, index_a, index_b, gate, 0.7, instances, True, True
    )
    value, size = inner(update, dy), update.norm() * dy.norm()
    through_u = inner(u.sum(0).gather(1, index_a[instances.index(device)]), du)
    for other in (through_u, inner(lora_B, dlora_B), inner(gate, dgate)):
        assert abs(other - value) <= CLOSE * size


@pytest.mark.parametrize("parameters", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_eager(dtype, parameters, device):
    """The design's bound: 1.5 x the error, against float64, of gathering and two batched products in that dtype."""
    B, L, D, E, r = 2, 20, 70, 9, 3
    N, instances = B * L, Instances(B, L)
    x, y, dy = (draw(N, D, device=device, seed=n, dtype=dtype) for n in (1, 2, 3))
    lora_A, lora_B = (draw(E, D, device=device, seed=n, dtype=parameters or dtype) for n in (4, 5))
    index_a, index_b, gate = (*(draw_index(B, E, r, device, seed=n) for n in (0, 1)), torch.ones(B, r, device=device))

    def eager(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, lora_A, lora_B)]
        A, B_ = leaves[1][index_a], leaves[2][index_b]
        update = torch.bmm(torch.bmm(leaves[0].view(B, L, D), A.mT), B_) * 2.5
        out = y.to(dtype) + update.view(N, D)
        return [out, *torch.autograd.grad((out * dy.to(dtype)).sum(), leaves)]

    u, _, _ = kernels.project(x, lora_A, None, instances, None, 0.0)
    out, *_ = kernels.expand(y, u, lora_B, index_a, index_b, gate, 2.5, instances, False)
    du, dlora_B, _ = kernels.expand_backward(dy, None, u, lora_B, index_a, index_b, gate, 2.5, instances, True, False)
    dx, dlora_A, _ = kernels.project_backward(
        None, x, du, lora_A, index_a, None, None, None, instances, None, 0.0, True, True
    )
    assert dlora_A.dtype == lora_A.dtype and dlora_B.dtype == lora_B.dtype and out.dtype == dx.dtype == dtype
    truth = eager(torch.float64)
    for ours, theirs, true in zip((out, dx, dlora_A, dlora_B), eager(dtype), truth):
        error, bound = ((t.double() - true).square().mean().sqrt() for t in (ours, theirs))
        assert error <= 1.5 * bound


def test_no_tokens(device):
    """A kept routing and no token: nothing to add, and gradients of zero."""
    x, lora_A, y = torch.empty(0, 8, device=device), draw(5, 8, device=device), torch.empty(0, 8, device=device)
    index, gate, instances = draw_index(2, 5, 3, device), torch.ones(2, 3, device=device), Instances(2, 0)
    u, _, _ = kernels.project(x, lora_A, None, instances, None, 0.0)
    out, *_ = kernels.expand(y, u, lora_A, index, index, gate, 1.0, instances, False)
    du, dlora_B, dgate = kernels.expand_backward(y, None, u, lora_A, index, index, gate, 1.0, instances, True, True)
    dx, dlora_A, _ = kernels.project_backward(
        None, x, du, lora_A, index, None, None, None, instances, None, 0.0, True, True
    )
    assert out.shape == dx.shape == (0, 8) and u.shape[1:] == (0, 5)
    assert all((gradient == 0).all() for gradient in (dlora_B, dgate, dlora_A))
