"""Each stage of the Triton kernels against the device's own copy bandwidth.

    python benchmarks/stages.py [--quick] [--out FILE.json]

First what the device does at best: bytes a second of a large copy (read and written), and operations a second of a
large product. Then, for each stage, the bytes that it cannot do without (the activations it reads and writes; the
pools and partial sums are not counted), its time, and its share of the copy's bandwidth. Without a GPU it runs
in Triton's interpreter at sizes that only show that everything works; its times mean nothing there.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import machine
from measure import Clock

from mixlora_kernels.backends import triton as kernels
from mixlora_kernels.routing import Instances

ROUNDS = 30
WIDTHS = [(4096, 4096), (4096, 11008), (11008, 4096), (5120, 13824)]
POOLS = [(16, 4), (32, 8)]
TOKENS = (16, 800)
DROPOUT = 0.05


@dataclass(frozen=True)
class Row:
    stage: str
    shape: str
    milliseconds: float
    bytes: int
    share: float  # of the copy's bandwidth


def time_of(clock: Clock, run: Callable[[], object], rounds: int) -> float:
    """The median in ms; ``Clock`` empties the cache before each round."""
    for _ in range(min(3, rounds)):
        run()
    return median(clock([run])[0] for _ in range(rounds))


def measure_limits(device: torch.device, clock: Clock, rounds: int, quick: bool) -> tuple[float, float]:
    """Bytes a second of a copy, and operations a second of a bfloat16 product."""
    size = 1 << (20 if quick else 30)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / time_of(clock, lambda: target.copy_(source), rounds) * 1e3
    n = 256 if quick else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in "ab")
    return copied, 2 * n**3 / time_of(clock, lambda: a @ b, rounds) * 1e3


def stages_of(D: int, O: int, B: int, L: int, E: int, r: int, device: torch.device, dtype: torch.dtype):
    """The name, the call and the bytes of each stage of one layer's training step, with its own inputs."""
    N, instances, scale = B * L, Instances(B, L), 8.0
    x, dx = (torch.randn(N, D, device=device, dtype=dtype) for _ in "ab")
    y, dy = (torch.randn(N, O, device=device, dtype=dtype) for _ in "ab")
    lora_A, lora_B, routers = (torch.randn(n, d, device=device) / d**0.5 for n, d in ((E, D), (E, O), (2 * E, D)))
    table, seed = torch.randn(r, E, E, device=device), torch.tensor([1], device=device)

    def project():
        return kernels.project(x, lora_A, routers, instances, seed, DROPOUT)

    u, sums, _ = project()
    index_a, index_b, gate, probs_a, probs_b, saved = kernels.route(sums, table, r, "straight_through", instances)
    routed = lora_B, index_a, index_b, gate, scale, instances

    def expand_backward():
        return kernels.expand_backward(dy, None, u, *routed, True, True)

    def route_backward():
        return kernels.route_backward(dgate, None, None, index_a, index_b, probs_a, probs_b, saved, "straight_through")

    du, _, dgate = expand_backward()
    dlogits, _ = route_backward()
    row_in, row_out = N * D * x.element_size(), N * O * x.element_size()
    yield "project", project, row_in
    yield "route", lambda: kernels.route(sums, table, r, "straight_through", instances), 0
    yield "expand", lambda: kernels.expand(y, u, *routed, True), 2 * row_out
    yield "expand, back", expand_backward, row_out
    yield "route, back", route_backward, 0
    yield "project, back", lambda: kernels.project_backward(
        dx, x, du, lora_A, index_a, dlogits, routers, None, instances, seed, DROPOUT, True, True
    ), 3 * row_in  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes; always so without a GPU")
    parser.add_argument("--out", type=Path, help="write the rows and the machine to this file as JSON")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quick, clock = options.quick or device.type == "cpu", Clock(device)
    rounds, (B, L) = (2, (2, 20)) if quick else (ROUNDS, TOKENS)
    copied, multiplied = measure_limits(device, clock, rounds, quick)
    print(f"{machine.device_name(device)}: copies {copied / 1e12:.3f} TB/s, multiplies {multiplied / 1e12:.1f} TFLOP/s")
    rows = []
    for D, O in [(64, 48)] if quick else WIDTHS:
        for E, r in POOLS:
            shape = f"{D}→{O}, {B}×{L}, E {E}, r {r}"
            for stage, run, moved in stages_of(D, O, B, L, E, r, device, torch.bfloat16):
                milliseconds = time_of(clock, run, rounds)
                row = Row(stage, shape, milliseconds, moved, moved / (milliseconds / 1e3) / copied)
                rows.append(row)
                print(f"{shape:32} {stage:14} {milliseconds * 1e3:9.1f} µs {moved / 1e6:8.1f} MB {row.share:6.1%}")
    if options.out:
        record = {"machine": machine.describe(device), "copy_bytes_per_second": copied}
        record |= {"product_operations_per_second": multiplied, "rows": [asdict(row) for row in rows]}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
