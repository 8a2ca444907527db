"""A layer as something to be measured: its forward and backward, and its agreement with the reference. And a stack of
layers: a decoding step's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import check
import torch
from implementations import Implementation
from measure import Candidate
from problem import Case, Problem, dtype_name


class Layer(Candidate):
    """One implementation of one case. A kept case has a forward only, of which a GPU replays a graph."""

    def __init__(self, name: str, problem: Problem, implementation: Implementation):
        self.name, self.problem, self.implementation = name, problem, implementation
        self.case: Case = problem.case
        self.every = 2 if name == "published" else 1  # it takes several times as long as the others
        self.captured = self.case.kept
        self.phases = {"forward": self.forward}
        if not self.case.kept:
            self.phases["forward+backward"] = self.backward
        implementation.module.train(not self.case.kept)
        self.y = None

    def reset(self) -> None:
        self.y = self.problem.x.grad = None
        for _, parameter in self.implementation.parameters():
            parameter.grad = None

    def forward(self) -> None:
        with torch.set_grad_enabled(not self.case.kept):
            self.y = self.implementation.call(self.problem.x)

    def backward(self) -> None:
        self.y.backward(self.problem.dy)

    def errors(self) -> dict[str, float]:
        """For each pass its largest error. With dropout, whose drawn elements differ between implementations, the same
        layer without it is compared."""
        if self.case.dropout:
            self.reset()
            self.implementation.module.eval()
            for phase in self.phases.values():
                phase()
            self.implementation.module.train()
        want = check.truth(self.name, self.problem)
        errors = {"y": check.relative_error(self.y.detach(), want["y"])}
        result = {"forward": errors["y"]}
        if not self.case.kept:
            got = {name: parameter.grad for name, parameter in self.implementation.parameters()}
            got["x"] = self.problem.x.grad
            errors |= {name: check.relative_error(grad, want[name]) for name, grad in got.items()}
            result["forward+backward"] = max(errors.values())
        check.require_agreement(errors, check.TOLERANCE[self.case.dtype], f"{self.name} at {self.case.name}")
        return result


@dataclass(frozen=True)
class StepCase:
    """All projections of so many of a decoder's blocks, for one new token of each of B instances, routing kept."""

    B: int
    blocks: int
    hidden: int
    wide: int
    dtype: torch.dtype
    E: int = 16
    r: int = 4

    def cases(self) -> Iterator[Case]:
        """Of query, key, value, output, gate, up and down, block after block."""
        shapes = [(self.hidden, self.hidden)] * 4 + [(self.hidden, self.wide)] * 2 + [(self.wide, self.hidden)]
        for d_in, d_out in shapes * self.blocks:
            yield Case(self.B, 1, d_in, d_out, self.dtype, self.E, self.r, kept=True)

    @property
    def name(self) -> str:
        return f"a layer of {7 * self.blocks}, {self.B}×1, {dtype_name(self.dtype)}, E {self.E}, r {self.r}"

    @property
    def product(self) -> "StepCase":
        return self

    @property
    def fields(self) -> dict:
        shape = {"B": self.B, "L": 1, "d_in": None, "d_out": None, "E": self.E, "r": self.r, "dropout": 0.0}
        return {"case": self.name, "dtype": dtype_name(self.dtype)} | shape


class Step(Candidate):
    """Layers one after another; what is told is the mean of a layer. Together they read more than a cache holds, and
    one of them is too short to be timed alone."""

    captured = True

    def __init__(self, name: str, case: StepCase, layers: Sequence[Layer]):
        self.name, self.case, self.layers = name, case, layers
        self.every, self.calls = layers[0].every, len(layers)
        self.phases = {"forward": self.forward}

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()

    def forward(self) -> None:
        for layer in self.layers:
            layer.forward()

    def errors(self) -> dict[str, float]:
        return {"forward": max(layer.errors()["forward"] for layer in self.layers)}
