"""torch.compile with fullgraph=True: no graph break, forward or backward, and the eager result."""

import pytest
import torch

import mixlora_kernels as mk
from mixlora_kernels.backends.eager import dropout

from .cases import assert_same, make_input, make_layer, make_mask, make_task, needs_compiler, run

pytestmark = pytest.mark.slow

CASES = {
    "plain": ({}, lambda: None),
    "mask": ({}, lambda: mk.RoutingContext(mask=make_mask(4, 6))),
    "weighted": ({"gate": "weighted"}, lambda: None),
    "binary, published": ({"gate": "binary", "conditioning": "published"}, lambda: None),
    "dropout": ({"dropout": 0.3}, lambda: None),
    "random": ({"routing": "random"}, lambda: None),
    "task": ({"routing": "task"}, lambda: mk.RoutingContext(task=make_task(4), task_mask=make_mask(4, 3))),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES)
def test_whole_graph(case):
    settings, make_context = CASES[case]
    layer, x, context = make_layer(**settings), make_input(4, 6, 12), make_context()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(run_compiled(compiled, layer, x, context), run(layer, x, context), 1e-12)


def run_compiled(compiled, layer, x, context):
    """``run`` with the compiled callable and the names of the layer itself."""
    compiled.named_parameters = layer.named_parameters
    return run(compiled, x, context)


def test_packed_and_kept():
    layer, x = make_layer(), make_input(1, 11, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    packed = mk.RoutingContext(cu_seqlens=torch.tensor([0, 3, 4, 11]))
    expected = run(layer, x, packed)
    assert_same(run_compiled(compiled, layer, x, packed), expected, 1e-12)
    kept = packed._replace(routing=expected[1].detach())
    y = compiled(x, kept)
    torch.testing.assert_close(y, layer(x, kept), rtol=1e-12, atol=1e-12)


def test_lengths_do_not_recompile_for_ever():
    """The second length makes the dimension dynamic; further ones reuse that graph."""
    layer, counter = make_layer(), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (5, 6, 7, 9, 12, 200):
        x = make_input(2, length, 12)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-12, atol=1e-12)
    assert counter.frame_count <= 2


@needs_compiler
def test_inductor():
    layer, x = make_layer(dtype=torch.float32), make_input(4, 6, 12, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True)
    assert_same(run_compiled(compiled, layer, x, None), run(layer, x), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_operators(dtype):
    x, lora_A, seed = torch.randn(70, 12, dtype=dtype), torch.randn(7, 12, dtype=dtype), torch.tensor([3])
    du, dx = torch.randn(70, 7, dtype=dtype), torch.randn(70, 12, dtype=dtype)
    torch.library.opcheck(dropout.project_dropped, (x, lora_A, seed, 0.3))
    torch.library.opcheck(dropout.project_dropped_backward, (dx, x, du, lora_A, seed, 0.3))
    torch.library.opcheck(dropout.project_dropped_backward, (None, x, du, lora_A, seed, 0.3))
    torch.library.opcheck(dropout.project_dropped_backward, (dx, None, du, lora_A, seed, 0.3))
