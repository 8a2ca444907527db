"""What a launch keeps, with a driver that compiles and launches nothing (benchmarks/launching/stand_in.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = '''
import sys

sys.path += [{root!r}, {root!r} + "/benchmarks"]
import torch
import triton
import triton.language as tl
from launching.stand_in import install

from mixlora_kernels.backends.kernels.launch import Launch

driver = install()
seen, through_triton = [], []
driver.record = seen.append


@triton.jit
def add(pair, share, out, n, scale, G: tl.constexpr):
    at = tl.arange(0, 16)
    total = tl.load(pair[0] + at, mask=at < n).to(tl.float32) + tl.load(pair[1] + at, mask=at < n).to(tl.float32)
    if share is not None:
        total *= tl.load(share)
    tl.store(out + at, scale * total, mask=at < n)


add.add_pre_run_hook(lambda *_, **__: through_triton.append(1))
launch = Launch(add, (2,), {{"num_warps": 1}}, n=16, scale=0.5, G=2)


def go(dtype=torch.float32, start=0, share=None):
    """What was passed on, and whether Triton had to look for a kernel."""
    memory = torch.zeros(64, dtype=dtype)
    pair, out = (memory[start : start + 16], memory[16:32]), torch.zeros(16)
    before = len(through_triton)
    launch(out.device, pair=pair, share=share, out=out)
    passed = seen[-1].arguments
    assert passed["pair[0]"] is pair[0] and passed["pair[1]"] is pair[1] and passed["out"] is out
    assert (passed["n"], passed["scale"], passed["G"]) == (16, 0.5, 2) and passed["share"] is share
    return len(through_triton) - before


assert [go(), go(), go()] == [1, 0, 0]
assert [go(torch.float16), go(torch.float16), go()] == [1, 0, 0]
assert [go(share=torch.ones(1)), go(share=torch.ones(1)), go()] == [1, 0, 0]
assert [go(start=1), go(start=1), go()] == [1, 1, 0]  # addresses that are no multiples of 16 bytes
assert len(launch.kept) == 3 and len(seen) == 12

nothing = Launch(add, (0,), {{}}, n=16, scale=0.5, G=2)
nothing(torch.device("cpu"), pair=(), share=None, out=None)
assert len(seen) == 12
try:
    Launch(add, (1,), {{}}, m=3)
except TypeError as error:
    assert str(error) == "add has no argument m"
else:
    raise AssertionError
print("done")
'''


@pytest.mark.slow
def test_a_kernel_is_looked_for_once(tmp_path):
    """Once for each combination of dtypes and absent tensors; every time where an address is not aligned."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.stdout.strip() == "done", done.stderr
