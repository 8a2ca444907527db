"""What the GPU suite's figures rest on: a stage's bytes, the bars, the batch that fits, one frozen model for all."""

import pytest
import torch
from cases import stages, suites, training
from cases.problem import Case
from harness import measure
from harness.rounds import finish
from report import summary

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_stages_bytes_by_hand():
    """2 x 5 tokens, 8 -> 6 elements of 2 bytes: a row of x 16 bytes, a row of y 12."""
    case = Case(2, 5, 8, 6, torch.bfloat16)
    expected = {"project": 160, "expand": 240, "expand, back": 120, "project, back": 480}
    assert {stage: stages.activation_bytes(stage, case) for stage in stages.TRAFFIC} == expected
    forward, backward = 1 * 8 + 2 * 6, 6 + 8 + 2 * 8  # elements a token, as the design counts them
    assert sum(expected.values()) == 10 * 2 * (forward + backward)


def test_the_share_of_a_copys_bandwidth_is_of_each_round():
    """The copy moves 800 bytes; the stage half of them, at 1, 1/2 and 2 times the copy's speed in the three rounds."""
    copy = {"implementation": "copy", "pass": "copy", "rounds_ms": [1.0, 2.0, 4.0], "bytes": 800, "operations": None}
    stage = {"implementation": "mixlora", "pass": "expand", "rounds_ms": [0.5, 2.0, 1.0], "bytes": 400, "operations": 6}
    row = finish(stage, (), [((), copy), ((), stage)])
    assert row["share_of_copy"] == 1.0
    assert row["bytes_per_second"] == 400e3 and row["operations_per_second"] == 6e3  # at a median of 1 ms


def test_times_are_of_one_call():
    class FakeClock:
        cuda = False

        def __call__(self, phases):
            return [6.0]

    repeating = measure.Candidate("repeating", None, {"only": lambda: None})
    repeating.calls = 4
    assert measure.interleave([repeating], FakeClock(), rounds=3, seconds=0) == [[[1.5]] * 3]


def row(suite, case, implementation, which, **told):
    empty = {"note": None, "error": None, "share_of_copy": None, "rounds_ms": [], "peak_bytes": None}
    ratios = {f"ratio_to_{name}": None for name in ("base", "peft_lora", "published")}
    names = {"suite": suite, "implementation": implementation, "pass": which}
    return empty | ratios | case.fields | names | told


def test_the_bars_of_a_gpu_from_rows_made_up():
    setting = suites.Setting(GPU, None, quick=False, seed=0)
    layer = Case(16, 800, 4096, 4096, torch.bfloat16, dropout=0.05)
    stage = Case(16, 800, 4096, 11008, torch.bfloat16, dropout=0.05)
    step = suites.step_case(setting, torch.bfloat16, 8, 16, 4)
    whole = training.TrainingCase(B=8)
    rows = [
        row("layer", layer, "mixlora", "forward+backward", ratio_to_base=1.1, ratio_to_peft_lora=0.9),
        row("stages", stage, "mixlora", "project", share_of_copy=0.9),
        row("stages", stage, "mixlora", "expand", share_of_copy=0.75),
        row("stages", stage, "copy", "copy", share_of_copy=1.0),
        row("training", whole, "mixlora", "training step", ratio_to_peft_lora=0.8, peak_bytes=90),
        row("training", whole, "peft_lora", "training step", ratio_to_peft_lora=1.0, peak_bytes=60),
        row("decode", step, "base", "forward", rounds_ms=[0.010, 0.010, 0.012]),
        row("decode", step, "mixlora", "forward", rounds_ms=[0.015, None, 0.016]),
    ]
    bars = {bar["claim"]: bar for bar in summary.summarise(rows, setting)}
    told = [(bar["measured"], bar["bar"], bar["met"]) for bar in bars.values()]
    assert told[:5] == [(1.1, 1.12, True), (0.9, 0.85, False), (0.75, 0.8, False), (0.8, 0.9, True), (1.5, 1.0, False)]
    assert told[5] == (pytest.approx(4.5), 6.0, True) and len(told) == 6  # 5 and 4 µs
    claims = list(bars)
    assert "(expand)" in claims[2] and bars[claims[2]]["bar_text"] == "≥ 80.0%"
    assert claims[3].startswith("training, decoder 32×4096, 8×800") and "peak" in claims[4]


@pytest.mark.parametrize("device", [CPU, GPU])
def test_no_bar_without_rows(device):
    assert summary.summarise([], suites.Setting(device, None, quick=False, seed=0)) == []


def test_what_only_a_gpu_can_do_is_left_out_with_a_line():
    setting, said = suites.Setting(CPU, None, quick=False, seed=0), []
    for suite in ("stages", "training"):
        (group,) = suites.SUITES[suite].groups(setting)
        assert group.build(said.append) == []
    assert said == ["left out: it needs a GPU; --quick shows on a CPU that it works"] * 2
    (case,) = setting.each_dtype(setting.square)
    assert (case.B, case.L, case.dtype) == (4, 320, torch.float32)
    (case,) = suites.Setting(GPU, None, quick=False, seed=0).each_dtype(setting.square)
    assert case.dtype == torch.bfloat16


SMALL = training.TrainingCase(**training.SMALL_DECODER | {"B": 4}, dtype=torch.float32, dropout=0.05)


@pytest.mark.slow
def test_one_frozen_model_for_all_and_only_the_adapters_learn():
    names = suites.WHOLE_MODELS
    steps = training.build_steps(SMALL, names, CPU, 0, print)
    first, *others = ({p.data_ptr() for p in s.model.parameters() if not p.requires_grad} for s in steps)
    assert all(frozen >= first for frozen in others)  # of ``published`` the routers too
    before = [p.clone() for p in steps[0].model.parameters()]
    for step in steps:
        for phase in step.phases.values():
            phase()
        assert step.inputs["inputs_embeds"].grad.abs().sum() > 0
        assert all(p.grad is not None for p in step.parameters)
        step.reset()
    assert all(torch.equal(p, b) for p, b in zip(steps[0].model.parameters(), before))
    base, mixlora = steps[0], steps[names.index("mixlora")]
    assert base.parameters == [] and base.held() == 0
    # AdamW keeps two numbers for each; and one count of steps for each tensor, of 4 bytes.
    numbers = sum(p.numel() for p in mixlora.parameters)
    assert mixlora.held() == 4 * (3 * numbers + len(mixlora.parameters))


@pytest.mark.slow
def test_the_batch_is_halved_until_it_fits_all(monkeypatch):
    """The second implementation has room for one instance only."""
    forward = training.Training.forward

    def with_limit(step):
        if step.name == "peft_lora" and step.case.B > 1:
            raise torch.OutOfMemoryError("no room")
        forward(step)

    monkeypatch.setattr(training.Training, "forward", with_limit)
    said = []
    steps = training.build_steps(SMALL, ("base", "peft_lora"), CPU, 0, said.append, limited=True)
    assert [step.case.B for step in steps] == [1, 1] and steps[0].inputs["labels"].shape == (1, 8)
    assert [line.split()[0] for line in said] == ["4", "2"]
    monkeypatch.setattr(training.Training, "forward", lambda step: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(RuntimeError, match="not even one instance"):
        training.build_steps(SMALL, ("base",), CPU, 0, said.append, limited=True)
