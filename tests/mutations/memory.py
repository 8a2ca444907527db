"""Races and accesses out of bounds of the Triton kernels, which on a GPU may pass every test of values."""

from . import Mutation

_KERNELS = "mixlora_kernels/backends/kernels"
_TESTS = "tests/backends/test_stages.py::test_adjoints"

MUTATIONS = [
    Mutation(
        "memory: expand writes beyond the last column", f"{_KERNELS}/expand.py",
        "tl.store(out, added, mask=tile)", "tl.store(out, added, mask=live[:, None])", _TESTS, sanitized=True,
    ),
    Mutation(
        "memory: project writes beyond the pool", f"{_KERNELS}/project.py",
        "products[g], mask=there)", "products[g], mask=live[:, None])", _TESTS, sanitized=True,
    ),
    Mutation(
        "memory: siblings write du to one place", f"{_KERNELS}/expand_backward.py",
        "tl.store(du + g.to(tl.int64) * N * R + at, sums", "tl.store(du + at, sums", _TESTS, sanitized=True,
    ),
    Mutation(
        "memory: all chunks of the walk leave their sums in one place", f"{_KERNELS}/walk.py",
        "(g * tl.num_programs(0) + chunk).to(tl.int64)", "(g * tl.num_programs(0) + chunk * 0).to(tl.int64)", _TESTS,
        sanitized=True,
    ),
]  # fmt: skip
