"""The figures that the pages name are those of the committed results."""

import json
import re
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
ROWS = {  # of the table in docs/benchmarks.md: the file, and the claim after the name of the implementation
    "forward+backward, time beyond": ("launch_path", "decoder layer, forward+backward, dropout 0.0: time"),
    "the same with dropout 0.05 | 2": ("launch_path", "decoder layer, forward+backward, dropout 0.05: time"),
    "decoding step, time": ("launch_path", "decoder layer, decoding step, dropout 0.0: time"),
    "launches of a training step": ("launch_path", "decoder layer, forward+backward, dropout 0.0: launches"),
    "the same with dropout 0.05 | 3": ("launch_path", "decoder layer, forward+backward, dropout 0.05: launches"),
    "training step on an H100": ("bytes", "dropout 0.0: / frozen on an H100"),
    "training step on an H200": ("bytes", "dropout 0.0: / frozen on an H200"),
}


def test_the_way_to_the_launches_and_the_bytes():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    told = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("launch_path", "bytes")}
    for begins, (file, claim) in ROWS.items():
        (row,) = re.findall(rf"^\| ({re.escape(begins)}.*) \|$", page, re.MULTILINE)
        for name, said in zip(("mixlora", "mixlora_tied"), row.split(" | ")[1:3], strict=True):
            (bar,) = [bar for bar in told[file]["summary"] if bar["claim"].startswith(f"{name}, {claim}")]
            assert (said, row.split(" | ")[3]) == (bar["measured_text"], bar["bar_text"])


def test_loras_figures_beside_them():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = json.loads((RESULTS / "launch_path.json").read_text())["rows"]
    lora = {
        row["pass"]: row
        for row in rows
        if (row["unit"], row["implementation"], row["dropout"]) == ("decoder layer", "peft_lora", 0.0)
    }
    assert f"LoRA takes {lora['decoding step']['ratio_to_frozen']:.3f} times" in page
    assert f"has {lora['forward+backward']['launches_beyond_frozen']} launches beyond" in page


CASES = {  # of the README's sentences: how the claim begins and ends
    "0.948 of LoRA's time": ("layer, 4096→4096, 4×320, float32, forward+backward", "peft_lora"),
    "0.347 of the released": ("layer, 4096→4096, 4×320, float32, forward+backward", "published"),
    "0.536 of LoRA's memory": ("memory, 4096→4096, 4×320, float32, forward+backward", "peft_lora"),
    "2048 takes 0.958 of": ("decoder 1×2048, 2×128, float32, E 16, r 4", ": mixlora / peft_lora"),
    "512 takes 0.996.": ("decoder 2×512, 8×64, float32, E 16, r 4", ": mixlora / peft_lora"),
    "512 takes 1.225 times": ("layer, 512→512, 8×64, float32, forward+backward", "peft_lora"),
}


def test_the_readmes_ratios():
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    summary = json.loads((RESULTS / "results.json").read_text())["summary"]
    for said, (begins, ends) in CASES.items():
        (bar,) = [bar for bar in summary if bar["claim"].startswith(begins) and bar["claim"].endswith(ends)]
        assert said in page and bar["measured_text"] in said


def test_the_spread_of_the_times():
    page = " ".join((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").split())
    rows = json.loads((RESULTS / "results.json").read_text())["rows"]
    spread = sorted(100 * (row["p80_ms"] - row["p20_ms"]) / row["median_ms"] for row in rows if row["median_ms"])
    assert f"{median(spread):.0f} % apart in the middle of the rows, and {spread[-1]:.0f} % at most" in page
