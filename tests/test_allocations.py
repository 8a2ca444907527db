"""Nothing of the size of x or y is allocated but y and x's gradient, and x is saved once, as it is."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import mixlora_kernels as mk

from .cases import make_input, make_layer

N, D = 8 * 256, 512


def large_allocations(step, at_least):
    """The sizes of the blocks of at least so many bytes that the allocator handed out during ``step``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    sizes = [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [size for size in sizes if size >= at_least]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_two_large_blocks_in_a_step(dtype, dropout, masked):
    layer = make_layer(D, D, dtype=torch.float32, num_factors=16, r=4, dropout=dropout)
    layer.base_layer.to(dtype)
    x, dy = make_input(8, 256, D, dtype=dtype), torch.randn(8, 256, D, dtype=dtype)
    context = mk.RoutingContext(mask=torch.arange(256).expand(8, 256) < torch.arange(200, 256, 7)[:8, None])

    def step():
        layer(x, context if masked else None).backward(dy)

    step()
    x.grad = None
    layer.zero_grad()
    itemsize = x.element_size()
    assert large_allocations(step, N * D * itemsize // 2) == [N * D * itemsize] * 2


def test_x_is_saved_once_and_not_cast():
    layer = make_layer(D, D, dtype=torch.float32, num_factors=16, r=4)
    layer.base_layer.to(torch.bfloat16)
    x, saved = make_input(8, 256, D, dtype=torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    large = [t for t in saved if t.shape[0] == N and t.numel() >= N * D // 2]
    assert len(large) == 1 and large[0].data_ptr() == x.data_ptr() and large[0].dtype == torch.bfloat16
