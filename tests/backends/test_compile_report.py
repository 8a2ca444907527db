"""The compile report, and that it fails where it has to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "compile_report.py"), "--quick"]


def report(*arguments, code=None):
    """Run the report, or code that changes it first, without the interpreter: compiling and interpreting exclude
    one another in a process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [*COMMAND, *arguments] if code is None else [sys.executable, "-c", code, "--quick", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("target, instruction", [("sm_90", "HGMMA"), ("gfx942", "MFMA")])
def test_no_kernel_spills_or_asks_for_too_much(target, instruction):
    done = report("--targets", target)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert {row[0] for row in rows} == {
        "project", "pool", "route", "expand", "expand_collect", "expand_gather", "route_backward", "routers_backward",
        "walk", "project_gather", "decode",
    }  # fmt: skip
    assert all(instruction in row for row in rows if row[0] == "project")


@pytest.mark.parametrize(
    "change, fault",
    [
        ("report.TARGETS['sm_90'] = report.TARGETS['sm_90']._replace(shared=1024)", "bytes of shared memory"),
        ("report.tuning.collect = lambda *a, **k: report.tuning.Tile(64, 256, 512, 4, 3, 40)", "spills"),
        ("report.measure_cuda = lambda compiled: report.Cost(1, 0, 0, 'HMMA')", "does not use the matrix unit"),
    ],
)
def test_a_fault_is_reported_and_fails(change, fault):
    benchmarks = str(ROOT / "benchmarks")
    code = f"import sys; sys.path.insert(0, {benchmarks!r}); import compile_report as report; {change}; "
    done = report("--targets", "sm_90", code=code + "sys.exit(report.main())")
    assert done.returncode == 1 and fault in done.stdout, done.stdout + done.stderr
