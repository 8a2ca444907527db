"""A layer as something to be measured: its forward and backward, and its agreement with the reference. And a stack of
layers: a decoding step's."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from harness.measure import Candidate, time_growing

from . import check
from .implementations import IMPLEMENTATIONS, Built, Unavailable, build
from .problem import Case, Problem, Shaped, dtype_name


class Layer(Candidate):
    """One implementation of one case. A kept case has a forward only, of which a GPU replays a graph."""

    def __init__(self, name: str, problem: Problem, built: Built):
        self.name, self.problem, self.built = name, problem, built
        self.case: Case = problem.case
        self.every = IMPLEMENTATIONS[name].every
        self.captured = self.case.kept
        self.phases = {"forward": self.forward}
        if not self.case.kept:
            self.phases["forward+backward"] = self.backward
        built.module.train(not self.case.kept)
        self.y = None

    def reset(self) -> None:
        self.y = self.problem.x.grad = None
        for _, parameter in self.built.parameters():
            parameter.grad = None

    def forward(self) -> None:
        with torch.set_grad_enabled(not self.case.kept):
            self.y = self.built.call(self.problem.x)

    def backward(self) -> None:
        self.y.backward(self.problem.dy)

    def trial(self, seconds: float) -> float:
        """With more and more of each instance's tokens, as long as they tell too little."""
        if IMPLEMENTATIONS[self.name].compiles:  # it would be compiled for each number of tokens
            return super().trial(seconds)

        def run(tokens: int) -> None:
            y = self.built.call(self.problem.x[:, :tokens])
            if not self.case.kept:
                y.backward(self.problem.dy[:, :tokens])
            self.reset()

        with torch.set_grad_enabled(not self.case.kept):
            return time_growing(run, self.case.L, seconds)

    def errors(self) -> dict[str, float]:
        """For each pass its largest error. With dropout, whose drawn elements differ between implementations, the same
        layer without it is compared."""
        if self.case.dropout:
            self.reset()
            self.built.module.eval()
            for phase in self.phases.values():
                phase()
            self.built.module.train()
        want = check.truth(self.name, self.problem)
        errors = {"y": check.relative_error(self.y.detach(), want["y"])}
        result = {"forward": errors["y"]}
        if not self.case.kept:
            got = {name: parameter.grad for name, parameter in self.built.parameters()}
            got["x"] = self.problem.x.grad
            errors |= {name: check.relative_error(grad, want[name]) for name, grad in got.items()}
            result["forward+backward"] = max(errors.values())
        check.require_agreement(errors, check.TOLERANCE[self.case.dtype], f"{self.name} at {self.case.name}")
        return result


@dataclass(frozen=True)
class StepCase(Shaped):
    """All projections of so many of a decoder's blocks, for one new token of each of B instances, routing kept."""

    B: int
    blocks: int
    hidden: int
    wide: int
    dtype: torch.dtype
    E: int = 16
    r: int = 4
    L = 1

    def cases(self) -> Iterator[Case]:
        """Of query, key, value, output, gate, up and down, block after block."""
        shapes = [(self.hidden, self.hidden)] * 4 + [(self.hidden, self.wide)] * 2 + [(self.wide, self.hidden)]
        for d_in, d_out in shapes * self.blocks:
            yield Case(self.B, 1, d_in, d_out, self.dtype, self.E, self.r, kept=True)

    @property
    def name(self) -> str:
        return f"a layer of {7 * self.blocks}, {self.B}×1, {dtype_name(self.dtype)}, E {self.E}, r {self.r}"


class Step(Candidate):
    """Layers one after another; what is told is the mean of a layer. Together they read more than a cache holds, and
    one of them is too short to be timed alone."""

    captured = True

    def __init__(self, name: str, case: StepCase, layers: Sequence[Layer]):
        super().__init__(name, case, {"forward": self.forward})
        self.layers, self.every, self.calls = layers, layers[0].every, len(layers)

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()

    def forward(self) -> None:
        for layer in self.layers:
            layer.forward()

    def errors(self) -> dict[str, float]:
        return {"forward": max(layer.errors()["forward"] for layer in self.layers)}


def build_layers(
    entries: Iterable[tuple[Case, str]], device: torch.device, seed: int, report: Callable[[str], None]
) -> list[Layer]:
    """The candidates of one group; all have the same frozen weight."""
    problems: dict[Case, Problem] = {}
    candidates, linear = [], None
    for case, name in entries:
        if case not in problems:
            problems[case] = Problem(case, device, seed, linear)
            linear = problems[case].linear
        try:
            candidates.append(Layer(name, problems[case], build(name, problems[case])))
        except Unavailable as error:
            report(f"{name} left out: {error}")
    return candidates


def build_step(case: StepCase, names: Iterable[str], device: torch.device, seed: int, report) -> list[Step]:
    """The candidates of one group: all have the same frozen weights."""
    problems = [Problem(layer, device, seed + number) for number, layer in enumerate(case.cases())]
    return [Step(name, case, [Layer(name, problem, build(name, problem)) for problem in problems]) for name in names]
