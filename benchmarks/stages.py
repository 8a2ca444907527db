"""The stages of the Triton kernels, and what the device does at best: a plain copy and a large product.

A stage's bytes are those it cannot do without: the activations that it reads and writes. The pools and the partial
sums are not counted, and ``route`` has none of an activation's size. What a stage computes is compared in the suite
layer, as part of a layer of the same shape, and by itself in tests/backends.
"""

from collections.abc import Callable, Iterator

import torch
from measure import Candidate
from problem import Case

from mixlora_kernels import backends
from mixlora_kernels.dropout import dropped_levels
from mixlora_kernels.routing import Instances

COPIED = 1 << 30  # bytes
MULTIPLIED = 8192  # rows and columns
SETS = 4  # of inputs, which take turns, so that none of them lies in a cache still

# An activation of d_in and one of d_out elements a token: how often a stage reads or writes each.
TRAFFIC = {
    "project": (1, 0),  # x
    "route": (0, 0),
    "expand": (0, 2),  # y, twice
    "expand, back": (0, 1),  # dy
    "route, back": (0, 0),
    "project, back": (3, 0),  # x; dx, twice
}


def activation_bytes(stage: str, case: Case) -> int | None:
    """What the stage reads and writes at least; None where it touches no activation."""
    of_in, of_out = TRAFFIC[stage]
    return case.B * case.L * (of_in * case.d_in + of_out * case.d_out) * case.dtype.itemsize or None


class Plain(Candidate):
    """Something without gradients, under one name as implementation and pass."""

    def __init__(self, name: str, case: Case, run: Callable[[], object]):
        self.name, self.case, self.phases = name, case, {name: run}


class Stage(Candidate):
    """One stage of ``mixlora``, as a pass of that name, on each of several sets of inputs in turn."""

    name = "mixlora"

    def __init__(self, stage: str, case: Case, runs: list[Callable[[], object]]):
        self.case, self.calls, self.bytes = case, len(runs), activation_bytes(stage, case)
        self.runs, self.phases = runs, {stage: self.run}

    def run(self) -> None:
        for run in self.runs:
            run()


def copy(case: Case, device: torch.device, size: int) -> Plain:
    """A copy of so many bytes, each of them read and written."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    candidate = Plain("copy", case, lambda: target.copy_(source))
    candidate.bytes = 2 * size
    return candidate


def product(case: Case, device: torch.device, n: int) -> Plain:
    """A product of two n × n matrices of random numbers."""
    a, b = (torch.randn(n, n, device=device, dtype=case.dtype) for _ in "ab")
    candidate = Plain("product", case, lambda: a @ b)
    candidate.operations = 2 * n**3
    return candidate


def stages(case: Case, device: torch.device, sets: int) -> list[Stage]:
    """The stages of a training step of the case, in their order."""
    prepared = [dict(calls_of(case, device)) for _ in range(sets)]
    return [Stage(stage, case, [calls[stage] for calls in prepared]) for stage in TRAFFIC]


def calls_of(case: Case, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each stage's call on inputs of its own; what one stage hands to the next is computed on the way."""
    from mixlora_kernels.backends import triton as kernels

    D, O, E, r, p, instances = case.d_in, case.d_out, case.E, case.r, case.dropout, Instances(case.B, case.L)
    N, scale, gated = case.B * case.L, case.config.scaling, "straight_through"
    x, dx = (torch.randn(N, D, device=device, dtype=case.dtype) for _ in "ab")
    y, dy = (torch.randn(N, O, device=device, dtype=case.dtype) for _ in "ab")
    lora_A, lora_B, routers = (torch.randn(n, d, device=device) / d**0.5 for n, d in ((E, D), (E, O), (2 * E, D)))
    table = torch.randn(r, E, E, device=device)
    seed = torch.tensor([1], device=device) if dropped_levels(p) else None

    def project():
        return kernels.project(x, lora_A, routers, instances, seed, p)

    u, sums, _ = project()
    index_a, index_b, gate, probs_a, probs_b, saved = kernels.route(sums, table, r, gated, instances)
    routed = lora_B, index_a, index_b, gate, scale, instances

    def expand_backward():
        return kernels.expand_backward(dy, None, u, *routed, True, True)

    def route_backward():
        return kernels.route_backward(dgate, None, None, index_a, index_b, probs_a, probs_b, saved, gated)

    du, _, dgate = expand_backward()
    dlogits, _ = route_backward()
    yield "project", project
    yield "route", lambda: kernels.route(sums, table, r, gated, instances)
    yield "expand", lambda: kernels.expand(y, u, *routed, True)
    yield "expand, back", expand_backward
    yield "route, back", route_backward
    yield "project, back", lambda: kernels.project_backward(
        dx, x, du, lora_A, index_a, dlogits, routers, None, instances, seed, p, True, True
    )  # fmt: skip


def find_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run here, None where they can."""
    obstacle = backends.find_obstacle(device.type, device.index, str(dtype))
    return obstacle and obstacle[1]
