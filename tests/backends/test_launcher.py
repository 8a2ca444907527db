"""What Triton's own launcher gives to the driver, which here is libcuda.c: all that lies between a stage and a GPU."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
HEADER = Path(sysconfig.get_path("include"), "Python.h")
KERNELS = {
    "decode_kernel", "expand_collect_kernel", "expand_gather_kernel", "expand_kernel", "pool_kernel",
    "project_gather_kernel", "project_kernel", "route_kernel", "routers_backward_kernel", "walk_kernel",
}  # fmt: skip


@pytest.mark.slow
# For a machine with Python and pip alone.
@pytest.mark.skipif(COMPILER is None, reason="Triton builds its launcher with a C compiler, and finds none")
@pytest.mark.skipif(not HEADER.exists(), reason="Triton builds its launcher with Python's headers, and finds none")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libcuda.so.1 is Linux's")
def test_every_parameter_reaches_the_driver(tmp_path):
    """Those of all kernels, of their first launch and of later ones, with addresses, numbers and grids as they were
    given."""
    library = tmp_path / "libcuda.so.1"
    source = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), Path(__file__).with_name("libcuda.c")]
    subprocess.run([COMPILER, *source], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.launched", str(library)],
        cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, *names = done.stdout.split()
    # A step has nine launches; with a given routing, which is not chosen and passes nothing back, six. And one decodes.
    assert set(names) == KERNELS and int(count) == 2 * (5 * 9 + 6 + 1)
