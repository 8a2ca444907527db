"""Products of tiles, and the precision in which float32 is multiplied."""

import torch
import triton
import triton.language as tl

NAMES_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch 2.9 and newer


def dot_precision() -> str:
    """How products of float32 are taken: exactly, unless torch's own setting allows tf32."""
    matmul = torch.backends.cuda.matmul
    return "tf32" if (matmul.fp32_precision == "tf32" if NAMES_PRECISION else matmul.allow_tf32) else "ieee"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b in float32; acc may be None."""
    if INTERPRETED:  # which holds bfloat16 as integers and would multiply those
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


INTERPRETED = tl.constexpr(not isinstance(dot, triton.runtime.JITFunction))
