"""What a launch reads and writes: of torch's operations by their schema, of Triton's kernels by the compiled kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launching.accesses import Unreadable, find_accesses
from launching.launches import record, size

ROOT = Path(__file__).resolve().parents[2]

# A loop that carries a pointer, branches that give one name twice, a choice between two pointers, an argument unused.
TTIR = """
module {
  tt.func public @k(%x: !tt.ptr<f32> loc("x"(#loc)), %y: !tt.ptr<f32>, %out: !tt.ptr<f32>, %acc: !tt.ptr<f32>, \
%idle: !tt.ptr<f32>, %n: i32) attributes {noinline = false} {
    %o = tt.make_range {end = 16 : i32, start = 0 : i32} : tensor<16xi32> loc(#loc)
    %p = tt.splat %x : !tt.ptr<f32> -> tensor<16x!tt.ptr<f32>>
    %zero = arith.constant dense<0.0> : tensor<16xf32>
    %t:2 = scf.for %s = %n to %n step %n iter_args(%q = %p, %sum = %zero) -> (tensor<16x!tt.ptr<f32>>, tensor<16xf32>) \
 : i32 {
      %v = tt.load %q : tensor<16x!tt.ptr<f32>>
      %w = "tt.reduce"(%v) <{axis = 0 : i32}> ({
      ^bb0(%a: f32, %b: f32):
        %c = arith.addf %a, %b : f32
        tt.reduce.return %c : f32
      }) : (tensor<16xf32>) -> f32
      %next = tt.addptr %q, %o : tensor<16x!tt.ptr<f32>>, tensor<16xi32>
      scf.yield %next, %v : tensor<16x!tt.ptr<f32>>, tensor<16xf32>
    } loc(#loc)
    %cond = arith.cmpi sgt, %n, %n : i32
    scf.if %cond {
      %v = tt.splat %y : !tt.ptr<f32> -> tensor<16x!tt.ptr<f32>>
      %w = tt.load %v : tensor<16x!tt.ptr<f32>>
    } else {
      %v = tt.splat %out : !tt.ptr<f32> -> tensor<16x!tt.ptr<f32>>
      tt.store %v, %t#1 : tensor<16x!tt.ptr<f32>>
    }
    %e = arith.select %cond, %acc, %out : !tt.ptr<f32>
    %f = tt.atomic_rmw fadd, acq_rel, gpu, %e, %zero : (!tt.ptr<f32>, f32) -> f32
    tt.return
  }
}
"""
NAMES = ["x", "y", "out", "acc", "idle", "n"]


def test_accesses_of_a_kernel():
    assert find_accesses(TTIR, NAMES) == {"x": "r", "y": "r", "out": "rw", "acc": "rw"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tt.load %v :", "tt.load %nowhere :"),
        ("%cond = arith.cmpi", "tt.call @other(%x)\n    %cond = arith.cmpi"),
        ("%idle: !tt.ptr<f32>, ", ""),
    ],
)
def test_a_kernel_that_is_not_understood_is_refused(old, new):
    with pytest.raises(Unreadable):
        find_accesses(TTIR.replace(old, new, 1), NAMES)


def test_bytes_of_torch_operations_by_hand():
    """Of 6 tokens, 4 -> 8, in two-byte elements: x 48 bytes, the weight 64, y 96."""
    weight = torch.empty(8, 4, dtype=torch.bfloat16, device="meta")
    x = torch.empty(2, 3, 4, dtype=torch.bfloat16, device="meta", requires_grad=True)
    dy = torch.empty(2, 3, 8, dtype=torch.bfloat16, device="meta")
    dropped = []

    def run():
        x.grad = None
        dropped.append(F.dropout(x, 0.5, True))
        y = F.linear(x, weight) + F.linear(x, weight)  # read, and its gradient added up, twice
        y.backward(dy)

    launches = record(run).launches
    told = [(launch.name, launch.bytes, launch.operations) for launch in launches]
    product = 2 * 6 * 4 * 8
    dropout = ("native_dropout", 48 + 48 + 24, 0)  # a mask of one byte an element
    assert told == [
        dropout, ("mm", 48 + 64 + 96, product), ("mm", 48 + 64 + 96, product), ("add", 3 * 96, 0),
        ("mm", 96 + 64 + 48, product), ("mm", 96 + 64 + 48, product), ("add", 3 * 48, 0),
    ]  # fmt: skip


def test_in_place_gathered_and_repeated():
    x, pool = torch.empty(6, 4, device="meta"), torch.empty(100, 4, device="meta")
    index = torch.empty(3, dtype=torch.int64, device="meta")

    def run():
        x.add_(pool[:1].expand(6, 4))
        x.zero_()
        pool.index_select(0, index)
        x.view(24).unsqueeze(0)
        torch.empty_like(x)

    assert [(launch.name, launch.read, launch.written) for launch in record(run).launches] == [
        ("add_", {"self": 96, "other": 16}, {"self": 96}),
        ("zero_", {}, {"self": 96}),
        ("index_select", {"self": 48, "index": 24}, {"output 0": 48}),
    ]
    assert size(torch.empty(1, 5).expand(7, 5)) == 20


def run_script(*command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_byte_report(tmp_path, backend):
    """At a small size, where the frozen layer's bytes can be counted by hand."""
    out = tmp_path / "bytes.json"
    shape = ("--tokens", "2x16", "--hidden", "64", "--intermediate", "128", "--dropout", "0")
    run_script("benchmarks/bytes_report.py", *shape, "--backend", backend, "--out", str(out))
    rows = {row["implementation"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    N, D, O = 2 * 16, 64, 128
    linears = 4 * [(D, D)] + 2 * [(D, O)] + [(O, D)]
    products = 2 * sum(2 * (N * i + i * o + N * o) for i, o in linears)  # forward and backward, two bytes an element
    sums = 3 * 3 * 2 * N * D  # of x's gradients: of q, k and v, and of gate and up
    assert rows["base"]["bytes"] == products + sums
    assert rows["base"]["launches_beyond_frozen"] == 0 and set(rows["base"]["ratio"].values()) == {1.0}
    ours = ("mixlora_tied", "mixlora", "mixlora_single")
    assert rows["base"]["bytes"] < rows[ours[0]]["bytes"] < rows[ours[1]]["bytes"] < rows[ours[2]]["bytes"]
    assert all((rows[name]["triton_launches"] > 0) == (backend == "triton") for name in ours)


@pytest.mark.slow
def test_the_committed_bytes_are_those_of_the_kernels(tmp_path):
    """At LLaVA-7B's size, where they also meet the bar."""
    out = tmp_path / "bytes.json"
    run_script("benchmarks/bytes_report.py", "--out", str(out))
    committed = ROOT / "benchmarks" / "results" / "cpu" / "bytes.json"
    now, then = (json.loads(path.read_text(encoding="utf-8")) for path in (out, committed))
    assert now["summary"] == then["summary"] and all(bar["met"] for bar in now["summary"])
    counted = [{(row["implementation"], row["dropout"]): row["bytes"] for row in told["rows"]} for told in (now, then)]
    assert counted[0] == counted[1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_launch_path(tmp_path, backend):
    out = tmp_path / "path.json"
    run_script("benchmarks/launch_path.py", "--rounds", "3", "--backend", backend, "--out", str(out))
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = {(r["unit"], r["implementation"], r["pass"], r["dropout"]): r for r in result["rows"]}
    training, step = "forward+backward", "decoding step"
    for unit in ("layer", "decoder layer"):
        assert all(
            rows[unit, name, training, p]["median_us"] > 0 for name in ("mixlora", "peft_lora") for p in (0, 0.05)
        )
        base, lora, ours = (rows[unit, name, step, 0]["crossings"] for name in ("base", "peft_lora", "mixlora"))
        # The kernels' launches cross no dispatcher; every operation of the torch backend does.
        assert 0 < ours < lora if backend == "triton" else base < ours
    frozen, lora = (rows["decoder layer", name, training, 0] for name in ("base", "peft_lora"))
    # Seven products and as many in the backward, and three sums of x's gradients. LoRA beside that: x to float32, two
    # products, the scale, the sum and its rounding; and their backward.
    assert (frozen["triton_launches"], frozen["torch_launches"]) == (0, 17)
    assert lora["launches_beyond_frozen"] == 7 * 15
    assert rows["decoder layer", "mixlora", training, 0.0]["crossings"] > frozen["crossings"]
    assert len(result["summary"]) == 12
