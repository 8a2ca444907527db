"""What is the C kernels' own: where they serve, sizes beyond their blocks, threads, strides, how they are called.

Of 37 ways in which the C code was broken on purpose (a mask left out, a strip too long, a wrong slot, a sum begun
without zeros …) these tests and test_layer.py catch all that change a result.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import warnings
from pathlib import Path
from struct import Struct

import pytest
import torch

import mixlora_kernels as mk
from mixlora_kernels import backends
from mixlora_kernels.backends.native import call

from ..cases import assert_same, make_input, make_layer, make_mask, run
from .conftest import needs_native
from .test_layer import CLOSE, both

SOURCES = Path(call.__file__).parent


def single(*shape, seed=1):
    return make_input(*shape, seed=seed, dtype=torch.float32)


def gcc_can_compile():
    """Whether the compiler that Python was built with is a gcc, and there, with OpenMP and the C library's headers."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "").split()[:1]
    if not compiler or not compiler[0].endswith("gcc") or shutil.which(compiler[0]) is None:
        return False
    flags = ["-std=gnu11", "-fopenmp", "-include", "math.h", "-include", "stdint.h", "-fsyntax-only", "-x", "c"]
    return subprocess.run([*compiler, *flags, os.devnull], capture_output=True).returncode == 0


# Where no gcc can compile them there is nothing that could have been compiled.
@pytest.mark.skipif(not gcc_can_compile(), reason="there is no gcc with OpenMP and the C library's headers")
def test_they_were_compiled_where_a_compiler_could():
    """All other tests here are skipped without them, and an installation without them succeeds."""
    assert backends.find_library_obstacle() is None


@needs_native
@pytest.mark.parametrize("shape", [(7, 75), (37, 15)])
@pytest.mark.parametrize("d_in, d_out", [(1100, 530), (530, 1100)])
def test_beyond_every_block(d_in, d_out, shape):
    """More columns than a block of rows or of a slice, more tokens than a strip and than one part of a sum, more
    instances than a tile and than a strip, more factors than a tile of rows; nothing a multiple of anything."""
    context = mk.RoutingContext(mask=make_mask(*shape))
    assert_same(*both("native", shape, context, d_in, d_out, num_factors=19, r=6), CLOSE)


@needs_native
def test_a_large_pool_and_many_instances():
    assert_same(*both("native", (100, 1), None, 8, 9, num_factors=300, r=3), CLOSE)


@needs_native
def test_a_binary_gate_beside_a_loss_of_the_probabilities():
    """The gate gives the routers nothing, the loss does, and so to x."""

    def gradient(backend):
        layer, x = make_layer(40, 37, dtype=torch.float32, backend=backend, gate="binary"), single(2, 9, 40)
        y, routing = layer(x, return_routing=True)
        return y, routing, {"x": torch.autograd.grad(y.square().sum() + 1e3 * routing.probs_b[:, 2].sum(), x)[0]}

    assert_same(gradient("native"), gradient("reference"), CLOSE)


@needs_native
def test_logits_of_any_size():
    """Whose exponentials are no float32."""
    actual, expected = both("native", (5, 9), change=lambda x: 300 * x)
    assert expected[1].probs_a.max() == 1
    assert_same(actual, expected, CLOSE)


@needs_native
def test_ties_go_to_the_lower_index():
    layer = make_layer(40, 37, dtype=torch.float32, backend="native", num_factors=19, r=6, conditioning="none")
    with torch.no_grad():
        layer.adapter.router_A.fill_(1)
        layer.adapter.router_B.fill_(1)
        layer.adapter.router_B[[3, 11]] = layer.adapter.router_A[0] * 2
    routing = layer(single(2, 9, 40).abs(), return_routing=True)[1]
    assert routing.index_a.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert routing.index_b.tolist() == [[3, 11, 0, 1, 2, 4]] * 2


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(threads):
    context = mk.RoutingContext(cu_seqlens=torch.tensor([0, 1, 30, 31, 700]))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, second = ([y, *routing, *gradients.values()] for y, routing, gradients in (
            run(make_layer(130, 70, dtype=torch.float32, backend="native"), single(700, 130), context) for _ in range(2)
        ))  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        assert_same(*both("native", (700,), context, 130, 70), CLOSE)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("grown", ["expanded", "transposed"])
def test_gradients_that_do_not_lie_in_rows(grown):
    def gradients(backend):
        layer, x = make_layer(40, 40, dtype=torch.float32, backend=backend), single(3, 40, 40)
        y, routing = layer(x.transpose(1, 2), return_routing=True)
        loss = y.sum() if grown == "expanded" else (y.transpose(1, 2) * single(3, 40, 40, seed=9).detach()).sum()
        return y, routing, dict(enumerate(torch.autograd.grad(loss, [x, *layer.adapter.parameters()])))

    assert_same(gradients("native"), gradients("reference"), CLOSE)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_another_dtype(dtype):
    """They are read as float32, and their gradients are theirs."""

    def result(backend):
        layer, x = make_layer(40, 37, dtype=torch.float32, backend=backend), single(2, 9, 40)
        layer.adapter.to(torch.bfloat16).to(dtype)
        return run(layer, x)

    (y, routing, gradients), expected = result("native"), result("torch")
    assert {g.dtype for name, g in gradients.items() if name != "x"} == {dtype}
    assert_same((y, routing, gradients), expected, 1e-2 if dtype == torch.bfloat16 else CLOSE)  # a gradient's rounding


@needs_native
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_does_not_matter(default):
    expected = run(make_layer(40, 37, dtype=torch.float32, backend="native"), single(2, 9, 40))
    torch.set_default_dtype(default)
    try:
        actual = run(make_layer(40, 37, dtype=torch.float32, backend="native"), single(2, 9, 40))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(actual, expected, 0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_base_of_another_dtype(dtype):
    """Its output is given, and y has its dtype."""
    layer, x = make_layer(40, 37, dtype=torch.float32, num_factors=9, r=7), single(2, 9, 40)
    frozen = single(2, 9, 37).detach().to(dtype)
    results = []
    for layer.backend in ("native", "torch"):
        y, routing = layer.adapter(x, frozen.clone().requires_grad_())
        assert y.dtype == dtype
        gradients = torch.autograd.grad(y.float().square().sum(), [x, *layer.adapter.parameters()])
        results.append((y, routing, dict(enumerate(gradients))))
    # bfloat16 keeps 8 bits of y, and of the gradient that comes back for it.
    assert_same(*results, 1e-2 if dtype == torch.bfloat16 else CLOSE)


@needs_native
@pytest.mark.parametrize("index", [-1, 7])
@pytest.mark.parametrize("name", ["index_a", "index_b"])
def test_an_index_of_no_factor_is_refused(name, index):
    layer, x = make_layer(40, 37, dtype=torch.float32, backend="native"), single(2, 9, 40)
    routing = layer(x, return_routing=True)[1].detach()
    getattr(routing, name)[1, 2] = index
    with pytest.raises(IndexError, match="must be of 0 to 6, a pool of 7 factors"):
        layer(x, mk.RoutingContext(routing=routing))


@needs_native
def test_a_second_backward_sees_what_the_first_saw():
    layer, x = make_layer(40, 37, dtype=torch.float32, backend="native", gate="weighted"), single(2, 9, 40)
    y, inputs = layer(x).square().sum(), [x, *layer.adapter.parameters()]
    first, second = torch.autograd.grad(y, inputs, retain_graph=True), torch.autograd.grad(y, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@needs_native
@pytest.mark.parametrize("shape", [(8, 1), (3, 5), (1, 1)])
def test_decoding(shape):
    """Without a gradient to come; the routing is kept."""
    layer, x = make_layer(70, 37, dtype=torch.float32, num_factors=9, r=5).eval(), single(*shape, 70).detach()
    results = []
    for backend in ("native", "reference"):
        layer.backend = backend
        _, routing = layer(x, return_routing=True)
        with torch.no_grad():
            results.append((layer(x, mk.RoutingContext(routing=routing)), routing, {}))
    assert_same(*results, CLOSE)


class Wrapped(torch.Tensor):
    pass


X = torch.ones(2, 3)
ELSEWHERE = {
    "float64": (X.double(), 4, False, TypeError, "needs x in torch.float32, got torch.float64"),
    "bfloat16": (X.bfloat16(), 4, False, TypeError, "needs x in torch.float32, got torch.bfloat16"),
    "meta": (X.to("meta"), 4, False, ValueError, "needs x on the CPU, got meta"),
    "dropout": (X, 4, True, ValueError, "has no dropout"),
    "pool": (X, 513, False, ValueError, "takes pools of up to 512 factors, got 513"),
    "empty": (X[:0], 4, False, ValueError, r"needs tokens, got x of shape \(0, 3\)"),
    "subclass": (X.as_subclass(Wrapped), 4, False, TypeError, "needs a tensor with an address.* got Wrapped"),
}


@needs_native
@pytest.mark.parametrize("case", ELSEWHERE)
def test_where_it_does_not_serve(case):
    """By default torch takes over without a word; by name it is refused."""
    x, factors, dropout, error, message = ELSEWHERE[case]
    assert backends.select(None, x, factors, dropout) is backends.torch
    with pytest.raises(error, match=f"backend='native' {message}: use backend='torch'"):
        backends.select("native", x, factors, dropout)


@needs_native
@pytest.mark.parametrize("follower", ["nobody", "trace", "export"])
def test_the_default_on_a_cpu(follower):
    """Native; but for whoever follows tensors through a computation, torch."""
    chosen = []

    class Choice(torch.nn.Module):
        def forward(self, x):
            if follower != "trace" or torch.jit.is_tracing():  # which calls it once more, without tracing
                chosen.append(backends.select(None, x))
            return x + 1

    choice = Choice()
    if follower == "nobody":
        choice(X)
    elif follower == "trace":
        torch.jit.trace(choice, X)
    else:
        torch.export.export(choice, (X,), strict=False)
    assert set(chosen) == {backends.native if follower == "nobody" else backends.torch}


@needs_native
def test_compiled_as_native_computes():
    layer, x = make_layer(40, 37, dtype=torch.float32), single(2, 9, 40)
    actual = run(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    y, routing, gradients = run(layer, x)
    assert_same(
        actual, (y, routing, {name.replace("adapter", "_orig_mod.adapter"): g for name, g in gradients.items()}), CLOSE
    )


@needs_native
def test_dropout_is_torchs_and_evaluation_native():
    layer, x = make_layer(40, 37, dtype=torch.float32, dropout=0.4), single(2, 9, 40)
    drawn = run(layer, x)
    layer.backend = "torch"
    assert all(torch.equal(drawn[2][name], gradient) for name, gradient in run(layer, x)[2].items())
    layer.backend = "native"
    with pytest.raises(ValueError, match="backend='native' has no dropout: use backend='torch'"):
        layer(x)
    assert_same(run(layer.eval(), x), run(make_layer(40, 37, dtype=torch.float32, backend="reference"), x), CLOSE)


def test_without_the_library(monkeypatch):
    def missing():
        raise FileNotFoundError("which were not compiled")

    monkeypatch.setattr(backends.native, "load", missing)
    backends.find_library_obstacle.cache_clear()
    try:
        layer, x = make_layer(40, 37, dtype=torch.float32), single(2, 9, 40)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = layer(x)
        assert backends.select(None, x) is backends.torch
        layer.backend = "torch"
        assert torch.equal(actual, layer(x))
        layer.backend = "native"
        with pytest.raises(ImportError, match="backend='native' needs its C kernels, which were not compiled: use"):
            layer(x)
    finally:
        backends.find_library_obstacle.cache_clear()


@needs_native
def test_a_library_of_another_version(monkeypatch):
    """As after an update of sources that are installed where they lie."""
    monkeypatch.setattr(call, "PACKED", Struct("@q"))
    monkeypatch.setattr(backends.native, "load", call.load.__wrapped__)
    backends.find_library_obstacle.cache_clear()
    backends.warn_once.cache_clear()
    try:
        with pytest.warns(UserWarning, match="compiled from an older version's sources: install the package again"):
            assert backends.select(None, X) is backends.torch
    finally:
        backends.find_library_obstacle.cache_clear()


def test_the_call_is_what_the_header_says():
    text = re.sub(r"/\*.*?\*/", "", (SOURCES / "call.h").read_text(), flags=re.S)
    fields, counts, addresses = text.split("typedef struct")[1], [], []
    for kind, names in re.findall(r"(?:const )?(int64_t|double|float|uint8_t) ([^;]*);", fields):
        for name in (name.strip() for name in names.split(",")):
            if name.startswith("*"):
                addresses.append((kind, name.lstrip("*")))
            else:
                counts.append((kind, name))
    assert [name for _, name in addresses] == list(call.ADDRESSES)
    assert counts == [*(("int64_t", name) for name in call.COUNTS), ("double", "scale")]
    assert fields.index("scale;") < fields.index("*")  # the counts, the scale, the addresses
    gates = re.search(r"enum {([^}]*)}", text)[1].lower().replace(" ", "").split(",")
    assert {name: number for number, name in enumerate(gates)} == call.GATES
    assert f"WIDEST = {call.WIDEST}," in (SOURCES / "products.h").read_text()


# It compiles the kernels anew, for processors that this one can stand in for: of x86 there are three generations in the
# library, of any other there is one, which the other tests run. An installed wheel needs no compiler.
@needs_native
@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles the kernels anew")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere there is one generation")
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3"])
def test_older_processors(level, tmp_path, monkeypatch):
    """The installed library holds code for three generations and runs the newest that the machine has."""
    path = tmp_path / "kernels.so"
    flags = ["-std=gnu11", "-O3", "-fopenmp", "-fPIC", "-Wno-psabi", f"-march={level}", "-DEACH_CPU="]
    subprocess.run(["gcc", *flags, "-shared", SOURCES / "kernels.c", "-o", path, "-lm"], check=True)
    library, used = ctypes.CDLL(str(path)), []
    monkeypatch.setattr(call, "load", lambda: used.append(level) or library)
    assert_same(*both("native", (3, 40), mk.RoutingContext(mask=make_mask(3, 40)), 75, 37), CLOSE)
    assert used == [level, level]
