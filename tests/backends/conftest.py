"""Every kernel of these tests writes into memory that holds no number, so that what it leaves out shows; and the
interpreter rounds to bfloat16 as GPUs do."""

import numpy
import pytest
import torch

try:
    import triton
except ImportError:
    triton = None

# Triton has wheels for Linux alone; elsewhere nothing is lost but its own tests.
needs_triton = pytest.mark.skipif(triton is None, reason="Triton has no package for this platform")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -(1 << 30))

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[pytest.param("triton", marks=needs_triton)])
def backend(request):
    return request.param


# Releases of Triton whose interpreter is known to convert through ``_convert_float``, which is private: in others it is
# left as it is, and test_the_interpreter_rounds_as_a_gpu says what to do.
CONVERTING = ("3.7", "3.8", "3.9")


@pytest.fixture(autouse=True)
def nearest(monkeypatch):
    """Where it rounds to bfloat16, Triton's interpreter cuts the last bits off: errors twice as large as a GPU's, and
    all of one sign."""
    if triton is None or not triton.__version__.startswith(CONVERTING):
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def to_nearest(values, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        rounded = torch.from_numpy(numpy.ascontiguousarray(values)).bfloat16()
        return rounded.view(torch.int16).numpy().view(numpy.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", to_nearest)
