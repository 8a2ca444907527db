"""What is around the kernels: decoding, registration, torch.compile, launches, and the choice of a backend."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch._dynamo.testing

import mixlora_kernels as mk
from mixlora_kernels.backends import select as backends
from mixlora_kernels.routing import Routing

from ..cases import assert_same, make_input, make_layer, make_mask, make_task, mostly_slow, relative_error, run
from ..test_siblings import make_group
from .groups import make_group as make_stages_group
from .groups import run_stages

kernels = pytest.importorskip("mixlora_kernels.backends.kernels")


def layer_and_input(device, *shape, d_in=40, **settings):
    layer = make_layer(d_in, 37, dtype=torch.float32, backend="triton", **settings).to(device)
    return layer, make_input(*shape, d_in, dtype=torch.float32).detach().to(device)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    from mixlora_kernels.backends.kernels.launch import Launch

    names, launch = [], Launch.__call__

    def record(self, *args, **tensors):
        names.append(self.kernel.__name__)
        launch(self, *args, **tensors)

    monkeypatch.setattr(Launch, "__call__", record)
    return names


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (2, 3)])
def test_decoding_is_one_launch(shape, launched, device):
    """A kept routing, few tokens and no gradient: one kernel, with the result of the others. CLOSE as elsewhere."""
    layer, x = layer_and_input(device, *shape, dropout=0.5)
    layer.eval()
    _, routing = layer(x, return_routing=True)
    context = mk.RoutingContext(routing=routing.detach())
    with torch.no_grad():
        launched.clear()
        y = layer(x, context)
        assert launched == ["decode_kernel"]
        layer.backend = "reference"
        assert relative_error(y, layer(x, context)) <= 1e-5


def test_decoding_packed_and_onto_a_given_output(device):
    layer, x = layer_and_input(device, 1, 7)
    context = mk.RoutingContext(cu_seqlens=torch.tensor([0, 2, 3, 7], device=device))
    results = []
    for backend in ("triton", "reference"):
        layer.backend = backend
        with torch.no_grad():
            _, routing = layer(x, context, return_routing=True)
            kept, base = context._replace(routing=routing), layer.base_layer(x)
            before = base.clone()
            results.append(layer.adapter(x, base, kept)[0])
            assert torch.equal(base, before)
    assert relative_error(*results) <= 1e-5


FORWARD = ["project_kernel", "pool_kernel", "route_kernel", "expand_kernel"]
BACKWARD = [
    "expand_collect_kernel", "expand_gather_kernel", "routers_backward_kernel", "walk_kernel", "project_gather_kernel",
]  # fmt: skip


@pytest.mark.parametrize("G", mostly_slow([1, 3], 0))
@pytest.mark.parametrize("settings", [{}, {"conditioning": "tied", "gate": "normalized"}, {"dropout": 0.3}])
def test_launches_of_a_training_step(settings, G, launched, device):
    """Nine for a group, however many siblings and whatever the mode; six where the routing is given."""
    bases, adapters, config = make_group(**settings)
    bases = [mk.FrozenLinear(*(t.float().to(device) for t in base)) for base in bases[:G]]
    factors = [adapter.float().to(device).factors for adapter in adapters[:G]]
    x = make_input(2, 20, 12, dtype=torch.float32).detach().to(device).requires_grad_()

    def step(context=None):
        launched.clear()
        ys, routing = mk.mixlora_siblings(x, bases, factors, config, context, training=True, backend="triton")
        sum(y.sum() for y in ys).backward()
        return routing

    routing = step()
    assert launched == FORWARD + BACKWARD
    step(mk.RoutingContext(routing=routing.detach()))
    assert launched == [name for name in FORWARD + BACKWARD if "rout" not in name and name != "pool_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_writing_the_update_first(bias, monkeypatch, device):
    """With the switch on, the frozen products are added to what the kernels wrote, forward and backward; everything is
    as with it off, but for the rounding of float32 sums in another order."""
    bases, adapters, config = make_group(gate="weighted")
    bases = [[t.float().to(device) for t in base] for base in bases]
    bases = [mk.FrozenLinear(weight, own if bias else None) for weight, own in bases]
    parameters = [p for adapter in adapters for p in adapter.float().to(device).parameters()]
    x = make_input(2, 20, 12, dtype=torch.float32).detach().to(device).requires_grad_()

    def step():
        factors = [adapter.factors for adapter in adapters]
        ys, _ = mk.mixlora_siblings(x, bases, factors, config, training=True, backend="triton")
        return [*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *parameters])]

    expected = step()
    monkeypatch.setattr(kernels.KERNELS, "writes_first", True)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "linear", None)  # a product by itself
        found = step()
    assert all(relative_error(ours, theirs) <= 1e-6 for ours, theirs in zip(found, expected, strict=True))


CASES = {
    "plain": ({}, lambda: None),
    "mask": ({}, lambda: mk.RoutingContext(mask=make_mask(2, 20))),
    "packed": ({}, lambda: mk.RoutingContext(cu_seqlens=torch.tensor([0, 17, 40]))),
    "weighted, dropout": ({"gate": "weighted", "dropout": 0.3}, lambda: None),
    "task": ({"routing": "task"}, lambda: mk.RoutingContext(task=make_task(2, dtype=torch.float32).detach())),
    "random": ({"routing": "random"}, lambda: None),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiles_to_one_graph(case, device):
    """Forward and backward, and the eager result: the same kernels on the same numbers."""
    torch._dynamo.reset()
    settings, make_context = CASES[case]
    context = make_context()
    if context is not None:
        context = mk.RoutingContext(*(f.to(device) if isinstance(f, torch.Tensor) else f for f in context))
    layer, x = layer_and_input(device, *((1, 40) if case == "packed" else (2, 20)), **settings)
    x.requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled.named_parameters = layer.named_parameters
    assert_same(run(compiled, x, context), run(layer, x, context), 1e-6)


def test_compiles_while_decoding(device):
    torch._dynamo.reset()
    layer, x = layer_and_input(device, 2, 1)
    with torch.no_grad():
        _, routing = layer(x, return_routing=True)
        context = mk.RoutingContext(routing=routing)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(x, context), layer(x, context)) <= 1e-6


@pytest.mark.slow
def test_lengths_do_not_recompile_for_ever(device):
    """The second length makes the dimension dynamic; further ones of the same bucket of tokens reuse that graph."""
    torch._dynamo.reset()
    layer, counter = layer_and_input(device, 2, 5)[0], torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (9, 10, 13, 15):
        x = make_input(2, length, 40, dtype=torch.float32).detach().to(device)
        assert relative_error(compiled(x), layer(x)) <= 1e-6
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"masked": True, "dropout": 0.3},
        {"packed": True, "conditioning": "tied", "gate": "normalized", "dtype": torch.bfloat16},
        {"conditioning": "published", "task": True},
        {"given": True},
    ],
)
def test_registered_operators(settings, device, monkeypatch):
    """torch.library.opcheck on what the stages call: schemas, what is mutated, fake outputs, dynamic shapes."""
    from mixlora_kernels.backends.kernels.launch import Op

    calls = []

    def on(op, x):
        def record(*arguments):
            calls.append((op.registered, tuple(copy(argument) for argument in arguments)))
            return op.run(*arguments)

        return record

    monkeypatch.setattr(Op, "on", on)
    group = make_stages_group(device, widths=(10, 7), L=9, D=12, **settings)
    routing, _ = run_stages(kernels.KERNELS, group)
    kept = Routing(*routing[:3], None, None)
    kernels.KERNELS.decode(group._replace(given=kept, seeds=None))
    monkeypatch.undo()
    assert len(calls) == 5
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


def copy(argument):
    """As an op's argument was before the op changed it."""
    if isinstance(argument, list | tuple):
        return [copy(item) for item in argument]
    return argument.detach().clone() if isinstance(argument, torch.Tensor) else argument


def python(code, **environment):
    """Run in a fresh interpreter; its standard output."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_importing_the_package_does_not_import_triton():
    """Not even when a layer runs on the CPU."""
    code = "import sys, torch, mixlora_kernels as mk; mk.MixLoRALinear(8, 8)(torch.ones(2, 3, 8))"
    code += "; print('triton' in sys.modules)"
    assert python(code) == "False"


REFUSED = """
import torch, mixlora_kernels as mk
{before}
layer = mk.MixLoRALinear(8, 8, backend='triton', dtype=torch.{dtype})
try:
    layer(torch.ones(2, 3, 8, dtype=torch.{dtype}))
except {error} as error:
    print(error)
"""
CPU = "", "float32", "ValueError", "", "needs a GPU, got a tensor on the CPU"
LATE = (
    "import triton, os; os.environ['TRITON_INTERPRET'] = '1'", "float32", "ValueError", "",
    "Triton was imported without it",
)  # fmt: skip
DOUBLE = "", "float64", "TypeError", "1", "got torch.float64: use backend='torch'"
MISSING = "import sys; sys.modules['triton'] = None", "float32", "ImportError", "1", "found none: install triton"
OLD = "import triton; triton.__version__ = '3.1.0'", "float32", "ImportError", "1", "found 3.1.0: upgrade it"


@pytest.mark.slow  # an interpreter each
@pytest.mark.parametrize("case", [CPU, LATE, DOUBLE, MISSING, OLD], ids=lambda case: case[-1])
def test_what_cannot_run_is_refused(case):
    before, dtype, error, interpret, message = case
    code = REFUSED.format(before=before, dtype=dtype, error=error)
    assert message in python(code, TRITON_INTERPRET=interpret)


def test_the_default_falls_back_with_one_warning(monkeypatch, device):
    """As on a GPU whose kernels cannot run: the torch backend serves, and says so once."""
    backends.warn_once.cache_clear()
    monkeypatch.setattr(backends, "find_obstacle", lambda *_: (ImportError, "no Triton here"))
    x = torch.ones(2, 3, 8).to(device)

    class OnGPU:
        device, dtype = torch.device("cuda", 0), torch.float32

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = [backends.select(None, OnGPU) for _ in range(3)]
    assert [str(w.message) for w in caught] == ["no Triton here; the torch backend is used instead"]
    assert {backend.name for backend in chosen} == {"torch"}
    with pytest.raises(ImportError, match="no Triton here"):
        backends.select("triton", x)
