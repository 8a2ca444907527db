"""The kernels' stages against plain torch's, in float32 and in half precision, and as adjoints of one another."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from mixlora_kernels.backends.base import Needs
from mixlora_kernels.backends.eager import EAGER

from ..cases import mostly_slow, relative_error
from .groups import EVERYTHING, draw, make_group, run_stages

KERNELS = pytest.importorskip("mixlora_kernels.backends.kernels").KERNELS
tuning = pytest.importorskip("mixlora_kernels.backends.kernels.tuning")

# Sums of at most some hundred float32 products in another order: 6e-8 each, and seldom as much as its root in all.
CLOSE = 1e-5

cases = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "L": st.sampled_from([1, 5, 16, 17, 35]),
        "D": st.sampled_from([1, 31, 32, 70]),
        "widths": st.sampled_from([(37,), (32, 1), (5, 70, 33)]),
        "E": st.sampled_from([1, 5, 16, 21]),
        "r": st.sampled_from([1, 4, 16, 21]),
        "packed": st.booleans(),
        "masked": st.booleans(),
        "given": st.booleans(),
        "conditioning": st.sampled_from(["factors", "published", "none", "tied"]),
        "gate": st.sampled_from(["straight_through", "weighted", "normalized"]),
    }
)


def assert_close(actual, expected, tolerance=CLOSE):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            # The floor is for what cancels to nothing: the routers' gradients at E = 1, say.
            assert relative_error(actual[name], value, 1e-2) <= tolerance, name


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases)
def test_as_plain_torch(case, device):
    case["r"] = min(case["r"], case["E"])
    group = make_group(device, **case)
    (routing, ours), (routing0, theirs) = run_stages(KERNELS, group), run_stages(EAGER, group)
    if group.given is None:
        assert torch.equal(routing.index_a, routing0.index_a) and torch.equal(routing.index_b, routing0.index_b)
        for name in ("gate", "probs_a", "probs_b"):
            assert relative_error(getattr(routing, name), getattr(routing0, name)) <= CLOSE, name
        assert (routing.index_a is routing.index_b) == group.options.tied
    assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", range(5))
def test_only_what_is_needed(wanted, device):
    """One kind of gradient at a time has the bits that it has among all; the gate's is that of a given routing."""
    needs = Needs(*(i == wanted for i in range(5)))
    group = make_group(device, widths=(37, 5), given=needs.gate)
    _, everything = run_stages(KERNELS, group)
    _, found = run_stages(KERNELS, group, needs, learns=needs.routers)
    for name, value in found.items():
        kind = name.rstrip("01")
        needed = {"x": needs.x, "lora_A": needs.lora_A, "lora_B": needs.lora_B, "gate": needs.gate}
        if needed.get(kind, needs.routers) and kind not in ("read", "y") and not (kind == "x" and not needs.routers):
            assert torch.equal(value, everything[name]) or kind == "lora_A", name


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 2])
def test_siblings_in_several_launches(together, device, monkeypatch):
    """As where the pools are so large that registers hold the sums of only one or two siblings."""
    group = make_group(device, widths=(37, 5, 20), dropout=0.0)
    _, expected = run_stages(KERNELS, group)
    monkeypatch.setattr(tuning, "siblings", lambda pool, draws=False: together)
    _, found = run_stages(KERNELS, group)
    assert_close(found, expected, 1e-6)
    for name, value in expected.items():  # x's gradient is added to in another order
        assert value is None or name == "x" or torch.equal(found[name], value), name


@pytest.mark.slow
def test_adjoints(device):
    """⟨expand(project(x)), dy⟩ = ⟨x, dx⟩ = ⟨lora_A, dlora_A⟩ = ⟨lora_B, dlora_B⟩ = ⟨gate, dgate⟩ of each sibling for a
    given routing: the update is linear in each, with the dropout of one call."""
    group = make_group(device, widths=(33, 7), D=70, L=37, dropout=0.3, given=True)
    N = len(group.x)
    dys = [draw(N, O, device=device, seed=O) for O in (33, 7)]
    routing, saved = KERNELS.project(group)
    updates, saved = KERNELS.expand(group, [torch.zeros_like(dy) for dy in dys], [True, True], routing, saved)
    needs, nothing = EVERYTHING._replace(routers=False), (None, None, None)
    dlora_B, dgate, carried = KERNELS.expand_backward(group, dys, nothing, routing, saved, needs)
    found = KERNELS.project_backward(group, None, routing, saved, carried, needs)

    def inner(a, b):
        return (a.double() * b.double()).sum()

    value = sum(map(inner, updates, dys))
    size = sum(u.norm() * dy.norm() for u, dy in zip(updates, dys))  # what rounding is relative to: they cancel
    scaled = inner(group.x, found.x), inner(routing.gate, dgate)
    for other in (
        *scaled,
        sum(inner(own.lora_A, d) for own, d in zip(group.factors, found.lora_A)),
        sum(inner(own.lora_B, d) for own, d in zip(group.factors, dlora_B)),
    ):
        assert abs(other - value) <= CLOSE * size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", mostly_slow([torch.bfloat16, torch.float16], 0))
def test_half_precision_is_no_worse_than_eager(dtype, device):
    """The design's bound: 1.5 x plain torch's error in that dtype, against float64; root mean squares."""
    group = make_group(device, widths=(70, 33), D=70, given=True, dtype=dtype)

    def double(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    exact = group._replace(
        x=group.x.double(),
        factors=[type(own)(*map(double, own)) for own in group.factors],
        given=type(group.given)(*map(double, group.given)),
        options=group.options._replace(dtype=torch.float64),
    )
    needs = EVERYTHING._replace(routers=False)
    (_, ours), (_, theirs) = run_stages(KERNELS, group, needs), run_stages(EAGER, group, needs)
    truth = run_stages_in_double(exact, needs, dtype)
    for name, true in truth.items():
        if true is not None:
            error, bound = ((t[name].double() - true).square().mean().sqrt() for t in (ours, theirs))
            assert error <= 1.5 * bound, name


def run_stages_in_double(group, needs, dtype):
    """From the y, dy and dx that the half-precision runs start from."""
    from . import groups

    def rounded(*shape, device, seed=0, dtype=torch.float64, half=dtype):
        return draw(*shape, device=device, seed=seed, dtype=half).to(dtype)

    original, groups.draw = groups.draw, rounded
    try:
        return run_stages(EAGER, group, needs)[1]
    finally:
        groups.draw = original


def test_no_tokens(device):
    """A given routing and no token: nothing to add, and gradients of zero."""
    group = make_group(device, L=5, given=True)
    group = group._replace(x=group.x[:0], instances=group.instances._replace(length=0, mean_weights=None))
    _, found = run_stages(KERNELS, group, EVERYTHING._replace(routers=False))
    assert found["y0"].shape == (0, 37) and found["x"].shape == (0, 40)
    assert all((found[name] == 0).all() for name in ("gate", "lora_A0", "lora_B0"))


@pytest.mark.parametrize("r", [1, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("widths", [(4096,), (4096, 4096, 4096), (11008, 11008)])
def test_workspaces_are_bounded(widths, r, monkeypatch):
    """What expand_backward hands on in planes and parts, at a training step's size: a quarter of dy for up to 16 slots,
    and at most dy. Dots, of which there is one for each chunk and plane, are counted as well."""
    from mixlora_kernels.backends.kernels.expand_backward import EXPAND_BACKWARD
    from mixlora_kernels.backends.kernels.launch import Launch

    B, L = 16, 1024
    seen = {}
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(Launch, "__call__", lambda self, device, **tensors: seen.update(tensors))
    dys = [torch.empty(B * L, O, device="meta", dtype=torch.bfloat16) for O in widths]
    index = torch.empty(len(widths), B, r, device="meta", dtype=torch.int64)
    u, gate = torch.empty(len(widths), B * L, r, device="meta"), torch.empty(len(widths), B, r, device="meta")
    lora_B = [torch.empty(128, O, device="meta") for O in widths]
    nothing = [None] * 6
    EXPAND_BACKWARD.run(dys, u, lora_B, index, index, gate, *nothing, 1.0, "weighted", None, B, L, True, True, False)
    used = sum(seen[name].numel() * 4 for name in ("planes", "parts"))
    assert used <= sum(dy.numel() * 2 for dy in dys) * (1 / 4 if r <= 16 else 1)


@pytest.mark.parametrize("tokens", [200, 4_097, 12_800, 100_000])
@pytest.mark.parametrize("width", [4096, 3 * 4096, 2 * 11008])
def test_a_backward_pass_is_cut_no_finer_than_it_has_to_be(width, tokens):
    """Spans grow as long as two programs are left for each multiprocessor, and no longer."""
    for tile in (tuning.collect("sm_90", tokens, width, 4, 2), tuning.walk("sm_90", tokens, width, 16, 2, False)):
        programs = tokens / tile.span * tuning.divide(width, tile.columns)
        assert tile.span == tile.rows or programs >= tuning.PROGRAMS
        assert tile.span == tuning.LONGEST or programs / 2 < tuning.PROGRAMS
