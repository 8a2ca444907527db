"""The time that Python, dispatcher and Triton take up to the launches, of a layer and of a decoder layer; needs no GPU.

    python benchmarks/launch_path.py [--rounds 40] [--backend torch] [--out FILE]

A GPU that is done before the host has its next work ready waits for it: with few tokens this path is a step's time. It
is measured on one core of a CPU, on shapes so small that nothing but the path takes time: PEFT's LoRA as it comes
(float32 adapters on a bfloat16 base), the frozen layer and this package, interleaved in one run, four timed runs in a
row each, in the thread's own time, of which what else the machine does is no part. Ratios are of medians.

Tensors of the CPU stand in for a GPU's. The package takes them for that (``stand_in.py``): it goes the kernels' way, up
to a driver of Triton's that launches nothing, and looks at no value. What a GPU would add is left out for all alike:
the driver's own time for a launch, some microseconds each, Triton's launcher, and the device guard. So the launches are
counted too, at the size of a LLaVA-7B on the meta device, and the dispatcher's calls of what is timed. An operation of
torch costs here what its dispatch, its checks and its output cost; its arithmetic takes about a microsecond. LoRA's
dropout, one operation on a GPU and three on a CPU, is one here.

The decoder layer is a LLaMA of one layer, embeddings given, with its attention, its norms and a head for eight words.
"""

import argparse
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network, and nothing may wait for it
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises on what is not used here

import numpy
import torch
from bytes_report import LLAVA_7B, training_step
from harness import machine
from launching.paths import STEP, TRAINING, UNITS, TimedPath, build_paths
from report.text import BARS, bar, table, write_json

DROPOUTS = (0.0, 0.05)
WARM_UP = 5  # rounds, by which everything is compiled and kept
COLUMNS = {
    "unit": ("unit", str),
    "pass": ("pass", str),
    "dropout": ("dropout", str),
    "implementation": ("implementation", str),
    "median_us": ("µs", "{:.0f}".format),
    "p20_us": ("p20", "{:.0f}".format),
    "p80_us": ("p80", "{:.0f}".format),
    "beyond_frozen_us": ("beyond frozen", "{:.0f}".format),
    "ratio_to_frozen": ("/ frozen", "{:.2f}".format),
    "ratio_to_lora_beyond_frozen": ("beyond / LoRA's", "{:.2f}".format),
    "crossings": ("crossings", str),
    "triton_launches": ("Triton", str),
    "torch_launches": ("torch", str),
    "launches_beyond_frozen": ("launches beyond", str),
}
RESULTS = Path(__file__).resolve().parent / "results" / "local" / "cpu" / "launch_path.json"


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT's calls, not ours
    torch.set_num_threads(1)
    arguments = parse_arguments()
    if arguments.backend == "triton":
        from launching.stand_in import install

        install()
    keys = [
        (unit, name, p) for unit, names in UNITS.items() for p in DROPOUTS for name in names if name != "base" or not p
    ]
    paths = [path for key in keys for path in build_paths(*key, arguments.backend)]
    measure(paths, arguments.rounds)
    rows = [describe(path) for path in paths]
    for row in rows:
        if row["pass"] == TRAINING:
            row |= count(row, arguments.backend)
    for row in rows:
        row |= compare(row, rows)
    bars = list(find_bars(rows))
    print(table(rows, COLUMNS), table(bars, BARS), sep="\n\n")
    told = {"rounds": arguments.rounds, "backend": arguments.backend}
    write_json(arguments.out, machine.describe(torch.device("cpu")), told, bars, rows)


def measure(paths: Sequence[TimedPath], rounds: int) -> None:
    """Each path once a round, in an order drawn anew."""
    draw = Random(0)
    for number in range(WARM_UP + rounds):
        if number == WARM_UP:
            for path in paths:
                path.microseconds.clear()
        for path in draw.sample(paths, len(paths)):
            path.time()


def describe(path: TimedPath) -> dict:
    quantiles = numpy.quantile(path.microseconds, (0.5, 0.2, 0.8)).round(2).tolist()
    return {
        "unit": path.unit,
        "implementation": path.name,
        "pass": path.which,
        "dropout": path.dropout,
        **dict(zip(("median_us", "p20_us", "p80_us"), quantiles)),
        "crossings": path.crossings(),
        "triton_launches": None,
        "torch_launches": None,
    }


def count(row: dict, backend: str) -> dict:
    """The launches of a training step at the size of a LLaVA-7B, of Triton and of torch."""
    case = LLAVA_7B._replace(dropout=row["dropout"], single=row["unit"] == "layer")
    launches = training_step(row["implementation"], case, backend).launches
    triton = sum(launch.triton for launch in launches)
    return {"triton_launches": triton, "torch_launches": len(launches) - triton}


def compare(row: dict, rows: Sequence[dict]) -> dict:
    """With the frozen layer, and with LoRA in what both take beyond it."""
    frozen, lora = find(rows, row, "base", 0.0), find(rows, row, "peft_lora", row["dropout"])
    beyond = row["median_us"] - frozen["median_us"]
    lora_beyond = lora["median_us"] - frozen["median_us"]
    counted = row["triton_launches"] is not None
    return {
        "beyond_frozen_us": round(beyond, 2),
        "ratio_to_frozen": row["median_us"] / frozen["median_us"],
        "ratio_to_lora_beyond_frozen": beyond / lora_beyond if row["implementation"] != "base" else None,
        "launches_beyond_frozen": launches(row) - launches(frozen) if counted else None,
    }


def launches(row: dict) -> int:
    return row["triton_launches"] + row["torch_launches"]


def find(rows: Sequence[dict], like: dict, implementation: str, dropout: float) -> dict:
    wanted = {"unit": like["unit"], "pass": like["pass"], "implementation": implementation, "dropout": dropout}
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


def find_bars(rows: Sequence[dict]) -> Iterator[dict]:
    """The bars, for the paper's form and for tied pairs."""
    for row in rows:
        if row["implementation"] not in ("mixlora", "mixlora_tied"):
            continue
        what = f"{row['implementation']}, {row['unit']}, {row['pass']}, dropout {row['dropout']}"
        if row["pass"] == STEP:
            yield bar(f"{what}: time / frozen", row["ratio_to_frozen"], 1.5)
        elif row["unit"] == "decoder layer":
            yield bar(f"{what}: time beyond frozen / LoRA's", row["ratio_to_lora_beyond_frozen"], 1.3)
            yield bar(f"{what}: launches beyond frozen", row["launches_beyond_frozen"], 40, "{:d}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--backend", choices=("triton", "torch"), default="triton")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the result (default %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
