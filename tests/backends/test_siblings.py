"""The kernels on a group of siblings: the bits that single layers have forward, and the same gradients."""

import pytest
import torch

import mixlora_kernels as mk

from ..cases import make_input, make_mask, make_task, mostly_slow, relative_error
from ..test_siblings import gradients, make_group, single, together
from .conftest import needs_triton

# x's gradient is a sum of as many terms in another order, in float32; the others are the same sums.
CLOSE = 1e-5

GROUPS = [
    ({"conditioning": "factors", "gate": "straight_through"}, "masked", 0.0, torch.float32),
    ({"conditioning": "tied", "gate": "normalized"}, "packed", 0.3, torch.float32),
    ({"conditioning": "published", "gate": "weighted"}, "rows", 0.3, torch.float32),
    ({"conditioning": "none", "gate": "normalized", "routing": "task"}, "rows", 0.0, torch.float32),
    ({"conditioning": "factors", "gate": "binary", "routing": "random"}, "masked", 0.3, torch.float32),
    ({"conditioning": "factors", "gate": "straight_through"}, "rows", 0.0, torch.bfloat16),
]


def make(dtype, **settings):
    bases, adapters, config = make_group(**settings)
    bases = [mk.FrozenLinear(base.weight.to(dtype), base.bias.to(dtype)) for base in bases]
    return bases, [adapter.float() for adapter in adapters], config


def context_for(mode, layout, device):
    fields = {"mask": make_mask(3, 19).to(device)} if layout == "masked" else {}
    if layout == "packed":
        fields["cu_seqlens"] = torch.tensor([0, 4, 38, 57], device=device)
    if mode.get("routing") == "task":
        fields["task"] = make_task(3, dtype=torch.float32).to(device)
    return mk.RoutingContext(**fields)


def to(bases, adapters, device):
    return [mk.FrozenLinear(*(t.to(device) for t in base)) for base in bases], [a.to(device) for a in adapters]


@needs_triton
@pytest.mark.slow  # test_stages' adjoints are of siblings, too
@pytest.mark.parametrize("case", GROUPS)
def test_as_single_layers(case, device):
    mode, layout, dropout, dtype = case
    bases, adapters, config = make(dtype, **mode, dropout=dropout)
    bases, adapters = to(bases, adapters, device)
    shape = (1, 57) if layout == "packed" else (3, 19)
    x = make_input(*shape, 12, dtype=dtype).detach().to(device).requires_grad_()
    results = []
    for run in (single, together):
        torch.manual_seed(3)
        ys, routings = run(x, bases, adapters, config, context_for(mode, layout, device), True, "triton")
        results.append((ys, routings, gradients(ys, routings, x, adapters)))
    (ys, routings, wanted), (ys1, routings1, got) = results
    assert all(map(torch.equal, ys, ys1))
    for one, other in zip(routings, routings1):
        assert all(map(torch.equal, one, other))
    # bfloat16's sums of three gradients of x round to it: twice its unit of 2^-8.
    tolerance = CLOSE if dtype == torch.float32 else 2**-7
    for one, other in zip(wanted, got):
        assert (one is None) == (other is None)
        assert one is None or relative_error(other, one) <= tolerance


@needs_triton
@pytest.mark.parametrize("training", mostly_slow([False, True], 0))
def test_a_kept_routing(training, device):
    """Decoding in one launch, and the stages."""
    bases, adapters, config = make(torch.float32)
    bases, adapters = to(bases, adapters, device)
    x = make_input(3, 19, 12, dtype=torch.float32).detach().to(device)
    _, routing = mk.mixlora_siblings(x, bases, [a.factors for a in adapters], config, backend="triton")
    context, step = mk.RoutingContext(routing=routing.detach()), x[:, :1].contiguous()
    with torch.set_grad_enabled(training):
        ys, _ = single(step, bases, adapters, config, context, training, "triton")
        ys1, _ = together(step, bases, adapters, config, context, training, "triton")
    assert all(map(torch.equal, ys, ys1))


@needs_triton
@pytest.mark.slow
def test_two_runs_give_the_same_bits(device):
    results = []
    for _ in range(2):
        bases, adapters, config = make(torch.float32, dropout=0.3)
        bases, adapters = to(bases, adapters, device)
        x = make_input(3, 19, 12, dtype=torch.float32).detach().to(device).requires_grad_()
        torch.manual_seed(3)
        ys, routings = together(x, bases, adapters, config, mk.RoutingContext(), True, "triton")
        results.append([*ys, *(t for routing in routings for t in routing), *gradients(ys, routings, x, adapters)])
    assert all(map(torch.equal, *results))
