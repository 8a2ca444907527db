"""The example from end to end; it checks its own promises and raises where one does not hold."""

import json

import pytest

from mixlora_llava.command.main import main
from mixlora_llava.example import digits
from mixlora_llava.example import run as example

pytestmark = pytest.mark.slow


def test_example_keeps_its_promises(tmp_path):
    main(["example", "--output", str(tmp_path), "--quick"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["resumed"]["identical"] and figures["resumed"]["killed_after"] < figures["resumed"]["steps"]
    assert figures["accuracy"]["mixlora"] >= figures["accuracy"]["untuned"] + example.MARGIN
    assert all(last < first / 2 for first, last in figures["loss"].values())
    report = (tmp_path / "report.md").read_text()
    assert f"{figures['accuracy']['mixlora']:.1f}" in report
    for name in ("samples.png", "loss.png", "interference.png", "selection/tsne.png", "selection/usage.png"):
        assert f"]({name})" in report and (tmp_path / name).stat().st_size > 5000
    scores = json.loads((tmp_path / "predictions/mixlora/scores.json").read_text())
    assert set(scores["tasks"]) == set(digits.TASKS)
    with pytest.raises(SystemExit):
        main(["example", "--output", str(tmp_path), "--quick"])
