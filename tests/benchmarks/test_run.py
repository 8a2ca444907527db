"""``benchmarks/run.py --quick`` as a user runs it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import check, stages, suites
from cases.implementations import IMPLEMENTATIONS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TRAINING = "forward+backward"
INTERPRETED = "in Triton's interpreter, where times mean nothing"
FIELDS = {
    "suite", "case", "implementation", "pass", "median_ms", "p20_ms", "p80_ms", "ratio_to_base", "ratio_to_peft_lora",
    "ratio_to_published", "peak_bytes", "launches", "error", "bytes", "operations", "share_of_copy", "note", "dtype",
    "device", "versions", "commit", "rounds", "rounds_ms",
}  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, str]:
    """The folder with the results of one run, and what it printed."""
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "benchmarks/run.py", "--quick", "--device", "cpu", "--seconds", "5", "--out", str(out)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def results(quick) -> dict:
    return json.loads((quick[0] / "results.json").read_text(encoding="utf-8"))


def test_every_suite_and_implementation_has_rows(quick, results):
    rows = results["rows"]
    assert {row["suite"] for row in rows} == set(suites.SUITES) and results["failures"] == results["left_out"] == []
    # One needs a compiler; where there was none the run says so.
    absent = {"compiled"} if "compiled left out" in quick[1] else set()
    expected = {name for name, one in IMPLEMENTATIONS.items() if one.layers} | {*suites.DECODER_NAMES}
    expected -= absent
    assert {row["implementation"] for row in rows} == expected | {"copy", "product"}
    assert {row["implementation"] for row in rows if row["suite"] == "decoder"} == set(suites.DECODER_NAMES)
    for suite in ("layer", "decode", "memory", "model", "training"):
        found = {row["implementation"] for row in rows if row["suite"] == suite}
        assert found >= {"base", "peft_lora", "eager", "published", "mixlora"}
    shown = {(row["pass"], row["E"]) for row in rows if row["suite"] == "stages" and row["implementation"] == "mixlora"}
    assert shown == {(stage, E) for stage in stages.TRAFFIC for E in (16, 32)}
    steps = {(row["E"], row["r"], row["checkpointing"]) for row in rows if row["suite"] == "training"}
    assert steps == {(16, 4, True), (16, 4, False), (32, 8, True), (32, 8, False)}


def test_rows_are_complete(results):
    for row in results["rows"]:
        assert row.keys() >= FIELDS
        assert row["device"] == "cpu" and row["launches"] is None
        if row["suite"] == "memory":
            assert row["median_ms"] is None and row["rounds_ms"] == [] and row["peak_bytes"] > 0
            continue
        assert row["rounds"] == sum(ms is not None for ms in row["rounds_ms"]) >= 2
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        if row["suite"] == "stages":
            assert row["note"] == (None if row["case"] == "at best" else INTERPRETED)
            assert (row["bytes"] is None) == (row["share_of_copy"] is None)
            continue
        assert row["ratio_to_base"] > 0 and row["note"] is None
        assert row["pass"] == "backward" or (row["peak_bytes"] > 0 and row["p20_ms"] > 0)
        if row["implementation"] == "base":
            assert row["ratio_to_base"] == 1.0


def test_the_backward_is_what_the_whole_takes_beyond_the_forward(results):
    rows = {(row["suite"], row["case"], row["implementation"], row["pass"]): row for row in results["rows"]}
    apart = [place for place in rows if place[-1] == "backward"]
    assert {place[0] for place in apart} == {"layer", "decoder", "scaling", "training"}
    for *place, _ in apart:
        forward, whole, backward = (rows[(*place, which)]["rounds_ms"] for which in ("forward", TRAINING, "backward"))
        assert backward == [None if a is None else b - a for a, b in zip(forward, whole)]


def test_errors_are_within_the_tolerance(results):
    tolerance = {"float32": 1e-4, "bfloat16": check.TOLERANCE[torch.bfloat16]}  # a model's own is the widest
    compared = [row for row in results["rows"] if row["suite"] != "stages" and row["pass"] != "backward"]
    assert all(0 <= row["error"] <= tolerance[row["dtype"]] for row in compared)
    exact = [row for row in compared if row["suite"] in ("layer", "training")]
    assert all(row["error"] > 0 for row in exact)  # float64 differs from float32


def test_summary_and_machine(results):
    assert results["machine"]["cores"] >= 1 and results["machine"]["versions"]["torch"] == torch.__version__
    assert results["arguments"]["quick"] is True
    assert all(bar["met"] is None and math.isfinite(bar["measured"]) for bar in results["summary"])
    # Each claim of the summary found its rows, but those about stages, whose times mean nothing here.
    assert len(results["summary"]) == 17 + 2 + 8 + 1 + 4


def test_report_and_plots(quick):
    out, printed = quick
    text = (out / "results.md").read_text(encoding="utf-8")
    for suite in suites.SUITES:
        assert f"\n{suite}\n" in printed and f"## {suite}\n" in text
        if suite == "stages":
            assert "E 16, r 4: in Triton's interpreter" in text and not (out / "stages.png").exists()
            continue
        assert f"({suite}.png)" in text
        plot = (out / f"{suite}.png").read_bytes()
        assert plot.startswith(b"\x89PNG\r\n\x1a\n") and plot.rstrip().endswith(b"IEND\xaeB`\x82")
    recorded = text + (out / "results.json").read_text(encoding="utf-8")
    assert str(ROOT) not in recorded and str(out) not in recorded


def test_an_unknown_suite_is_refused():
    command = [sys.executable, "benchmarks/run.py", "--suite", "layers"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "stages, layer, decoder, scaling, decode, memory, model, training" in done.stderr
