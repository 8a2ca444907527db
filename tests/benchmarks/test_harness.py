"""The pieces that a benchmark's figures rest on: rounds, shares of time, memory, inputs, what is refused."""

import re
import sys

import pytest
import torch
from cases import implementations, layers
from cases.implementations import Published
from cases.problem import Case, Problem
from harness import measure
from harness.rounds import Group, Runner

import mixlora_kernels as mk

CPU = torch.device("cpu")


def test_paired_ratio_is_of_each_round():
    # The third round is ten times slower for both, and the second had only one of them.
    assert measure.paired_ratio([1.0, 5.0, 20.0, 3.0], [2.0, None, 40.0, 4.0]) == 0.5
    assert measure.paired_ratio([1.0], [None]) is None


class Sleeping(measure.Candidate):
    """A candidate that does nothing, and keeps count of it."""

    def __init__(self, name: str, log: list[str], every: int = 1):
        self.every, self.phases = every, {"only": lambda: log.append(name)}


def test_every_round_has_its_own_order():
    """Each candidate once a round (b in every second one), and each of the two others as often before as after it."""
    log = []
    candidates = [Sleeping("a", log), Sleeping("b", log, every=2), Sleeping("c", log)]
    times = measure.interleave(candidates, measure.Clock(CPU), rounds=measure.MAX_ROUNDS, seconds=60)
    rounds = len(times[0])
    assert rounds == measure.MAX_ROUNDS
    assert [phases is None for phases in times[1]] == [number % 2 == 1 for number in range(rounds)]
    orders, text = [], iter("".join(log))
    for number in range(rounds):
        orders.append([next(text) for _ in range(2 if number % 2 else 3)])
        assert sorted(orders[-1]) == ["a", "c"] if number % 2 else ["a", "b", "c"]
    first = sum(order.index("a") < order.index("c") for order in orders)
    assert abs(first - rounds / 2) < 5 * (rounds / 4) ** 0.5  # standard deviations of a fair draw


class Slow(measure.Candidate):
    """A candidate whose call is predicted to take so many seconds, and whose phases must not be run if that is many."""

    def __init__(self, name: str, seconds: float, log: list[str]):
        self.name, self.case, self.seconds = name, Case(1, 1, 8, 8), seconds
        self.phases = {"only": lambda: log.append(name)}

    def trial(self, seconds: float) -> float:
        return self.seconds


@pytest.mark.parametrize(
    ("seconds", "predicted"),
    [
        ([1.0, 1000.0, 1.0], 4 * 1.0 + 4 * 1000.0),  # an examination and three rounds; the last is not asked
        ([10.0, 10.0, 10.0], 4 * 10.0 + 4 * 10.0),  # each by itself would fit into twice the share
        ([1.0, 2.0, 1.0], None),
    ],
)
def test_a_case_that_does_not_fit_its_share_is_left_out(seconds, predicted, capsys):
    log = []
    slow = [Slow(f"c{number}", each, log) for number, each in enumerate(seconds)]
    runner = Runner(CPU, print)
    group = Group("layer", "a case", lambda report: slow, rounds=1, weight=1)
    rows = runner.run(group, seconds=25)
    if predicted is None:
        assert len(rows) == 3 and runner.left_out == []
        return
    told = {"suite": "layer", "case": "a case", "predicted_seconds": predicted, "share_seconds": 25}
    assert rows == [] and log == [] and runner.left_out == [told] and runner.failures == []
    assert f"would take at least {predicted:.0f} s, its share of the time is 25 s" in capsys.readouterr().out
    assert len(runner.run(group, seconds=25, whatever_it_takes=True)) == 3


@pytest.mark.parametrize(
    ("per_token", "limit", "runs"), [(1.0, 30.0, [1, 2]), (0.01, 9.0, [1, 2, 4, 8, 16, 32, 64, 100])]
)
def test_a_first_call_grows_until_it_tells(per_token, limit, runs, monkeypatch):
    """The part that tells more than the limit is the last; one that takes too little to tell is doubled."""
    now, seen = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def run(tokens: int) -> None:
        seen.append(tokens)
        now[0] += tokens * per_token

    assert measure.time_growing(run, 100, limit) == pytest.approx(100 * per_token)
    assert seen == runs


def test_a_layers_first_call_is_of_a_part_of_its_tokens(monkeypatch):
    """And leaves no gradient; a decoding step has one token alone."""
    for kept, L, tokens in ((False, 7, [1, 2, 4, 7]), (True, 1, [1])):
        problem = Problem(Case(2, L, 16, 8, E=8, r=2, kept=kept), CPU, seed=0)
        layer = layers.Layer("mixlora", problem, implementations.build("mixlora", problem))
        seen, call = [], layer.built.call
        layer.built = layer.built._replace(call=lambda x, seen=seen, call=call: (seen.append(x.shape[1]), call(x))[1])
        assert layer.trial(seconds=1e9) > 0 and seen == tokens
        assert problem.x.grad is None and layer.built.module.adapter.lora_A.grad is None


class Allocating(measure.Candidate):
    """Holds 4 MB, and 1 MB more for a moment; then in a second phase 2 MB in the place of the 4."""

    def __init__(self):
        self.kept = None
        self.phases = {"first": self.first, "second": self.second}

    def reset(self) -> None:
        self.kept = None

    def first(self) -> None:
        self.kept = torch.empty(4_000_000, dtype=torch.uint8)
        torch.empty(1_000_000, dtype=torch.uint8)

    def second(self) -> None:
        self.kept = None
        self.kept = torch.empty(2_000_000, dtype=torch.uint8)
        torch.empty(3_500_000, dtype=torch.uint8)


def test_peak_memory_is_exact():
    assert measure.peak_bytes(Allocating(), CPU) == [5_000_000, 5_500_000]


def test_allocations_in_order_and_stderr_untouched(capfd):
    changes = measure.allocations(lambda: torch.empty(1000, dtype=torch.uint8))
    assert changes == [1000, -1000]
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "after\n"


@pytest.mark.parametrize("kept", [False, True])
def test_inputs_leave_no_near_ties(kept):
    problem = Problem(Case(3, 1 if kept else 7, 64, 48, E=8, r=3, kept=kept), CPU, seed=1)
    pooled = problem.x.detach().mean(dim=1)
    logits = pooled @ problem.factors["router_A"].T
    gaps = logits.sort(dim=-1).values.diff(dim=-1)
    # float32 through a pseudo-inverse, which multiplies the rounding; the gaps are of 0.57.
    torch.testing.assert_close(gaps, torch.full_like(gaps, 4 / 7), atol=1e-4, rtol=0)


def test_published_is_the_published_configuration():
    problem = Problem(Case(3, 7, 64, 48, torch.float64, E=8, r=3), CPU, seed=2)
    config = mk.MixLoRAConfig.published(r=3, num_factors=8)
    layer = mk.MixLoRALinear.from_linear(problem.linear, config, backend="reference")
    layer.adapter.load_state_dict(problem.factors)
    published = Published(problem.linear, config, problem.factors)
    want, routing = layer(problem.x, return_routing=True)
    # float64: equal but for the order in which 64 products are summed, some 1e-14.
    torch.testing.assert_close(published(problem.x), want, atol=1e-12, rtol=1e-12)
    for chosen, expected in zip(published.choose(problem.x), routing):
        assert torch.equal(chosen, expected)
    assert {name for name, p in published.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_a_wrong_implementation_is_not_timed(capsys):
    """And counts among the failures, while the others are measured."""
    case = Case(2, 5, 32, 32, E=8, r=2)

    def build(report):
        problem = Problem(case, CPU, seed=0)
        wrong = implementations.build("mixlora", problem)
        with torch.no_grad():
            wrong.module.adapter.lora_B.mul_(1.001)
        right = implementations.build("base", problem)
        return [layers.Layer("mixlora", problem, wrong), layers.Layer("base", problem, right)]

    runner = Runner(CPU, print)
    rows = runner.run(Group("layer", case.name, build, rounds=1, weight=1), seconds=1, whatever_it_takes=True)
    assert {row["implementation"] for row in rows} == {"base"}
    (failure,) = runner.failures
    # Several parts are off by the same thousandth; rounding decides which are named.
    assert re.search(r"mixlora at 32→32.* disagrees .* most in (\w+ 1\.0e-03(, |$)){3}", failure)
    assert failure in capsys.readouterr().out
