"""The compile report, and that it fails where it has to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


MATRIX_UNITS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "MFMA"}


def report(*arguments, change=""):
    """Run the report, changed by some code first, without the interpreter: compiling and interpreting exclude one
    another in a process."""
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import compile_report as report; {change}\n"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code + "sys.exit(report.main())", "--quick", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_no_kernel_spills_or_asks_for_too_much():
    """On any target; and each target's matrix unit takes project's products."""
    done = report()
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:-1]]
    for target, instruction in MATRIX_UNITS.items():
        own = [row for row in rows if row[1] == target]
        assert {row[0] for row in own} == {
            "project", "pool", "route", "expand", "expand_collect", "expand_gather",
            "routers_backward", "walk", "project_gather", "decode",
        }  # fmt: skip
        assert all(instruction in " ".join(row[8:]) for row in own if row[0] == "project"), target


LITTLE_MEMORY = "report.TARGETS['sm_90'] = report.TARGETS['sm_90']._replace(shared=1024)"
LARGE_TILES = "report.tuning.collect = lambda *a, **k: report.tuning.Tile(64, 256, 512, 4, 3, 40)"
OTHER_UNIT = "report.measure_cuda = lambda files: report.Cost(1, 0, 'HMMA')"


@pytest.mark.parametrize(
    "kernel, change, fault",
    [
        ("project", LITTLE_MEMORY, "bytes of shared memory"),
        ("expand_collect", LARGE_TILES, "spills"),
        ("project", OTHER_UNIT, "does not use the matrix unit"),
    ],
)
def test_a_fault_is_reported_and_fails(kernel, change, fault):
    done = report("--targets", "sm_90", "--kernels", kernel, change=change)
    assert done.returncode == 1 and fault in done.stdout, done.stdout + done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()[1:-1]} == {kernel}


def test_nothing_compiled_is_no_success():
    assert report("--targets", "sm_90", "--kernels", "no_such_kernel").returncode == 1
