"""What the adapters of a LLaVA-7B decoder layer add to its memory traffic, launch by launch; needs no GPU.

    python benchmarks/bytes_report.py [--tokens 16x800] [--dropout 0.05] [--launches] [--backend torch]

The seven projections run forward and backward on the meta device, at their real size and without memory. Each launch
says which of its tensors it reads and writes (``launches.py``), and each of these counts once, in bytes; so do the
additions of gradients that autograd makes, for the frozen layer as well. What lies between the projections is left out.

A launch takes what its bytes take at the device's bandwidth or what its product takes at the device's rate, whichever
is more; the ratio is that of the sums. Bandwidth and rate are assumptions, nine and six and a half tenths of the data
sheets' (3.35 and 4.8 TB/s, 989 TFLOP/s in bfloat16): give what the lines "copy" and "product" of
``python benchmarks/run.py --suite stages`` say on the GPU at hand. Caches are not modelled: what one launch leaves in
them for the next costs less than is told here.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network, and nothing may wait for it
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises on what is not used here

import torch
from cases.adapted import adapt_model, use_backend
from harness import machine
from launching.launches import Launch, Recorder, record
from launching.projections import OneProjection, Projections
from report.text import BARS, bar, table, write_json

import mixlora_kernels as mk

NAMES = ("base", "peft_lora", "mixlora_single", "mixlora", "mixlora_tied_single", "mixlora_tied")
BAR = 1.10
COLUMNS = {
    "implementation": ("implementation", str),
    "dropout": ("dropout", str),
    "bytes": ("GB", lambda value: f"{value / 1e9:.3f}"),
    "bytes_beyond_frozen": ("beyond frozen", lambda value: f"{value / 1e9:.3f}"),
    "triton_launches": ("Triton", str),
    "torch_launches": ("torch", str),
    "launches_beyond_frozen": ("launches beyond", str),
}  # and the time relative to the frozen layer's, on each device
RESULTS = Path(__file__).resolve().parent / "results" / "local" / "cpu" / "bytes.json"


class Device(NamedTuple):
    name: str
    bandwidth: float  # bytes a second
    rate: float  # operations of a product a second

    def seconds(self, launches: Sequence[Launch]) -> float:
        return sum(max(launch.bytes / self.bandwidth, launch.operations / self.rate) for launch in launches)


class Shape(NamedTuple):
    """B instances of L tokens through the seven projections of a decoder layer, or through a single one."""

    B: int = 16
    L: int = 800
    hidden: int = 4096
    intermediate: int = 11008
    dropout: float = 0.0
    single: bool = False


LLAVA_7B = Shape()


def training_step(name: str, shape: Shape, backend: str) -> Recorder:
    """The launches of its forward and backward under one implementation."""
    plain = OneProjection(shape.hidden) if shape.single else Projections(shape.hidden, shape.intermediate)
    model = adapt_model(name, plain, mk.MixLoRAConfig(dropout=shape.dropout), seed=0).train()
    use_backend(model, backend)
    x = torch.empty(shape.B, shape.L, shape.hidden, device="meta", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.empty_like(x, requires_grad=False)

    def run():
        x.grad = None
        model.zero_grad(set_to_none=True)
        model(inputs_embeds=x).backward(dy)

    return record(run, driver_of(name, backend))


def driver_of(name: str, backend: str):
    """Where the implementation's kernels are launched into; None: it has none."""
    if backend != "triton" or not name.startswith("mixlora"):
        return None
    from launching.stand_in import install

    return install()


def describe(name: str, dropout: float, recorder: Recorder, base: Recorder, devices: Sequence[Device]) -> dict:
    launches, frozen = recorder.launches, base.launches
    total = sum(launch.bytes for launch in launches)
    return {
        "implementation": name,
        "dropout": dropout,
        "bytes": total,
        "bytes_beyond_frozen": total - sum(launch.bytes for launch in frozen),
        "triton_launches": sum(launch.triton for launch in launches),
        "torch_launches": sum(not launch.triton for launch in launches),
        "launches_beyond_frozen": len(launches) - len(frozen),
        "ratio": {device.name: device.seconds(launches) / device.seconds(frozen) for device in devices},
        "launches": [launch._asdict() | {"bytes": launch.bytes} for launch in launches],
    }


def main() -> None:
    arguments = parse_arguments()
    B, L = map(int, arguments.tokens.split("x"))
    devices = [
        Device("H100", arguments.h100_bandwidth * 1e12, arguments.rate * 1e12),
        Device("H200", arguments.h200_bandwidth * 1e12, arguments.rate * 1e12),
    ]
    shape = Shape(B, L, arguments.hidden, arguments.intermediate)
    rows = []
    for dropout in arguments.dropout:
        base = None
        for name in NAMES:
            recorder = training_step(name, shape._replace(dropout=dropout), arguments.backend)
            base = base or recorder
            rows.append(describe(name, dropout, recorder, base, devices))
    print(table([row | row["ratio"] for row in rows], COLUMNS | {d.name: (d.name, "{:.3f}".format) for d in devices}))
    if arguments.launches:
        show_launches(rows)
    bars = [
        bar(f"{row['implementation']}, dropout {row['dropout']}: / frozen on an {name}", ratio, BAR)
        for row in rows
        if row["implementation"] in ("mixlora", "mixlora_tied")
        for name, ratio in row["ratio"].items()
    ]
    print(table(bars, BARS))
    told = {name: value for name, value in vars(arguments).items() if name != "out"}
    write_json(arguments.out, machine.describe(torch.device("cpu")), told, bars, rows)


def show_launches(rows: Sequence[dict]) -> None:
    """Each launch that moves something, most first."""
    for row in rows:
        print(f"{row['implementation']}, dropout {row['dropout']}")
        for launch in sorted(row["launches"], key=lambda launch: -launch["bytes"]):
            tensors = [f"{name} {n / 1e6:.1f} {how}" for how in ("read", "written") for name, n in launch[how].items()]
            print(f"    {launch['bytes'] / 1e6:9.2f} MB  {launch['name']}: {', '.join(tensors)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", default="16x800", help="instances x tokens of each (default 16x800)")
    parser.add_argument("--hidden", type=int, default=LLAVA_7B.hidden)
    parser.add_argument("--intermediate", type=int, default=LLAVA_7B.intermediate)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--backend", choices=("triton", "torch"), default="triton")
    parser.add_argument("--h100-bandwidth", type=float, default=3.0, help="TB/s (default 3.0)")
    parser.add_argument("--h200-bandwidth", type=float, default=4.3, help="TB/s (default 4.3)")
    parser.add_argument("--rate", type=float, default=640.0, help="TFLOP/s of a bfloat16 product (default 640)")
    parser.add_argument("--launches", action="store_true", help="list every launch and its tensors")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the result (default %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
