"""A layer as something to be measured: its forward and backward, and its agreement with the reference."""

import check
import torch
from implementations import Implementation
from problem import Case, Problem


class Layer:
    """One implementation of one case; see ``measure.Candidate``. A kept case has a forward only."""

    def __init__(self, name: str, problem: Problem, implementation: Implementation):
        self.name, self.problem, self.implementation = name, problem, implementation
        self.case: Case = problem.case
        self.every = 2 if name == "published" else 1  # it takes several times as long as the others
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
        """For each pass its largest error, after the phases have run. With dropout, whose drawn elements differ
        between implementations, the same layer without it is compared.

        Raises:
            check.Disagreement: one of them is beyond its tolerance.
        """
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
