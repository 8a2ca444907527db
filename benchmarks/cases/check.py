"""What a layer's output and gradients should be, in float64, and how far an implementation is from it."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

import mixlora_kernels as mk

from .implementations import IMPLEMENTATIONS, Implementation
from .problem import Problem

# Largest error accepted, relative to the largest element of the tensor compared. float32: the bar of the tests.
# Half precision: u = A·x, s, the update and y are each rounded to 8 (11) bits, that is by up to 2^-8 (2^-11), and
# their gradients likewise: five roundings in a row, all at their worst.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5 * 2**-8, torch.float16: 5 * 2**-11}


class Disagreement(AssertionError):
    """An implementation does not compute what it should."""


def truth(name: str, problem: Problem) -> dict[str, Tensor]:
    """The output ``y`` and the gradients of ``x`` and of what is trained, by name, all in float64."""
    chosen, case = IMPLEMENTATIONS[name], problem.case
    y_frozen, dx_frozen = frozen_products(problem)
    if chosen.kind == "frozen":
        return {"y": y_frozen, "x": dx_frozen}
    # Its own parameters: what storing them in a lower dtype costs is no error of the computation.
    dtype = torch.float32 if chosen.exact else case.dtype
    factors = {key: value.to(dtype).double().requires_grad_() for key, value in problem.factors.items()}
    x = problem.x.detach().double().requires_grad_()
    if chosen.kind == "lora":
        y = y_frozen + 2 * (x @ factors["lora_A"][: case.r].T) @ factors["lora_B"][: case.r]
    else:
        y = _mixlora(chosen, problem, x, y_frozen, factors)
    y.backward(problem.dy.double())
    result = {"y": y.detach(), "x": x.grad + dx_frozen}
    result |= {key: value.grad for key, value in factors.items() if value.grad is not None}
    if chosen.kind == "lora":
        result |= {"lora_A": result["lora_A"][: case.r], "lora_B": result["lora_B"][: case.r].T}
    return result


@lru_cache(maxsize=1)  # the implementations of a case are checked one after the other
def frozen_products(problem: Problem) -> tuple[Tensor, Tensor]:
    """The frozen layer's output for x, and what dy contributes to x's gradient through it, both in float64."""
    weight = problem.linear.weight.double()
    return F.linear(problem.x.detach().double(), weight), problem.dy.double() @ weight


def _mixlora(chosen: Implementation, problem: Problem, x: Tensor, y_frozen: Tensor, factors: dict[str, Tensor]):
    case, config = problem.case, chosen.configure(problem.case.config)
    instances = []
    for b in range(case.B):
        kept = tuple(t[b] for t in problem.routing[:3]) if case.kept and chosen.keeps else None
        options = {"conditioning": config.conditioning, "gate": config.gate, "chosen": kept}
        y, _ = mk.reference.mixlora(x[b], y_frozen[b], **factors, r=case.r, scaling=config.scaling, **options)
        instances.append(y)
    return torch.stack(instances)


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest element of ``want``."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def require_agreement(errors: dict[str, float], tolerance: float, what: str) -> None:
    """Raise unless every error, by the name of what was compared, is within the tolerance (a NaN is not)."""
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        worst = sorted(wrong, key=wrong.get, reverse=True)[:3]
        listed = ", ".join(f"{name} {wrong[name]:.1e}" for name in worst)
        raise Disagreement(f"{what} disagrees with its float64 reference beyond {tolerance:.1e}, most in {listed}")
