"""A batch without instances, and instances without tokens that need no mean: nothing in, nothing out, and gradients of
zero."""

import pytest
import torch

import mixlora_kernels as mk

from ..cases import TASK_DIM, make_layer
from .conftest import needs_triton

BACKENDS = ["torch", pytest.param("triton", marks=needs_triton), "reference"]
# Plain torch gathers rows for instances of 40 tokens. A mean of no tokens is refused.
CASES = [(routing, 0, L) for routing in ("instance", "task", "given") for L in (0, 5, 40)]
CASES += [("task", 2, 0), ("given", 2, 0)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("routing, B, L", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing(backend, routing, B, L, dropout, device):
    settings = {"routing": "task" if routing == "task" else "instance", "gate": "weighted", "dropout": dropout}
    layer = make_layer(20, 37, dtype=torch.float32, backend=backend, **settings).to(device)
    x = torch.zeros(B, L, 20, device=device, requires_grad=True)
    context = mk.RoutingContext(task=torch.zeros(B, TASK_DIM, device=device) if routing == "task" else None)
    if routing == "given":
        index, probs = torch.arange(3, device=device).expand(B, 3).contiguous(), torch.ones(B, 7, device=device)
        context = mk.RoutingContext(routing=mk.Routing(index, index, torch.ones(B, 3, device=device), probs, probs))
    y, found = layer(x, context, return_routing=True)
    assert y.shape == (B, L, 37) and y.dtype == torch.float32
    assert [tuple(t.shape) for t in found] == [(B, 3)] * 3 + [(B, 7)] * 2
    assert [t.dtype for t in found] == [torch.int64] * 2 + [torch.float32] * 3
    y.sum().backward()
    assert x.grad.shape == x.shape
    for name, parameter in layer.adapter.named_parameters():
        if not (routing == "given" and name.startswith("router")):
            assert (parameter.grad == 0).all(), name
    with torch.no_grad():
        assert layer.eval()(x, mk.RoutingContext(routing=found.detach())).shape == y.shape
