"""The one change that these tests make to Triton: without it they would judge kernels by another rounding."""

import pytest
import torch

from .conftest import CONVERTING, triton

if triton is None:
    pytest.skip("Triton has no package for this platform", allow_module_level=True)
from triton import language as tl


@triton.jit
def convert_kernel(x_ptr, y_ptr, COUNT: tl.constexpr):
    offsets = tl.arange(0, COUNT)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(tl.bfloat16))


def test_the_interpreter_rounds_as_a_gpu(device):
    """To the nearest bfloat16 and, half way, to the even one; bfloat16 keeps 7 bits after the point."""
    ulp = 2.0**-7
    x = torch.tensor([1 + ulp / 4, 1 + 0.75 * ulp, 1 + ulp / 2, 1 + 1.5 * ulp], device=device)
    y = torch.empty(4, dtype=torch.bfloat16, device=device)
    convert_kernel[(1,)](x, y, COUNT=4)
    assert y.tolist() == [1, 1 + ulp, 1, 1 + 2 * ulp], (
        f"Triton {triton.__version__} rounds float32 to bfloat16 differently: tests/backends/conftest.py replaces its "
        f"conversion in {', '.join(CONVERTING)} only. If this release still cuts bits off, add it there"
    )
