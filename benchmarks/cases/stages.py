"""The stages of the Triton kernels, and what the device does at best: a plain copy and a large product.

A stage's bytes are those it cannot do without: the activations that it reads and writes. The pools and the partial
sums are not counted. What a stage computes is compared in the suite
layer, as part of a layer of the same shape, and by itself in tests/backends.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from harness.measure import Candidate

from mixlora_kernels.backends import select
from mixlora_kernels.backends.base import Factors, Group, Needs, Options
from mixlora_kernels.dropout import draw_seeds, dropped_levels
from mixlora_kernels.routing import Instances

from .problem import Case, draw_factors

COPIED = 1 << 30  # bytes
MULTIPLIED = 8192  # rows and columns
SETS = 4  # of inputs, which take turns, so that none of them lies in a cache still

# An activation of d_in and one of d_out elements a token: how often a stage reads or writes each.
TRAFFIC = {
    "project": (1, 0),  # x
    "expand": (0, 2),  # y, twice
    "expand, back": (0, 1),  # dy
    "project, back": (3, 0),  # x; dx, twice
}


def activation_bytes(stage: str, case: Case) -> int:
    """What the stage reads and writes at least."""
    of_in, of_out = TRAFFIC[stage]
    return case.B * case.L * (of_in * case.d_in + of_out * case.d_out) * case.dtype.itemsize


def copy(case: Case, device: torch.device, size: int) -> Candidate:
    """A copy of so many bytes, each of them read and written."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    candidate = Candidate("copy", case, {"copy": lambda: target.copy_(source)})
    candidate.bytes = 2 * size
    return candidate


def product(case: Case, device: torch.device, n: int) -> Candidate:
    """A product of two n × n matrices of random numbers."""
    a, b = (torch.randn(n, n, device=device, dtype=case.dtype) for _ in "ab")
    candidate = Candidate("product", case, {"product": lambda: a @ b})
    candidate.operations = 2 * n**3
    return candidate


def stages(case: Case, device: torch.device, sets: int) -> Iterator[Candidate]:
    """The stages of a training step of ``mixlora`` in their order, each a pass of that name, on each of several sets of
    inputs in turn."""
    prepared = [dict(calls_of(case, device)) for _ in range(sets)]
    for stage in TRAFFIC:
        candidate = Candidate("mixlora", case, {stage: in_turn([calls[stage] for calls in prepared])})
        candidate.calls, candidate.bytes = sets, activation_bytes(stage, case)
        yield candidate


def in_turn(runs: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All of them, none of whose results outlives its run."""

    def run() -> None:
        for one in runs:
            one()

    return run


def calls_of(case: Case, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each stage's call on inputs of its own; what one stage hands to the next is computed on the way."""
    from mixlora_kernels.backends.kernels import KERNELS

    N, config = case.B * case.L, case.config
    x, dx = (torch.randn(N, case.d_in, device=device, dtype=case.dtype) for _ in "ab")
    y, dy = (torch.randn(N, case.d_out, device=device, dtype=case.dtype) for _ in "ab")
    p = case.dropout if dropped_levels(case.dropout) else 0.0
    group = Group(
        x=x,
        bases=[y],
        factors=[Factors(**draw_factors(case.d_in, case.d_out, config, device))],
        read=None,
        given=None,
        seeds=draw_seeds(1, device) if p else None,
        instances=Instances(case.B, case.L),
        options=Options(
            r=case.r, scale=config.scaling, p=p, gate=config.gate, conditioning=config.conditioning, tied=False,
            reads_x=True, dtype=case.dtype,
        ),
    )  # fmt: skip
    needs, nothing = Needs(x=True, lora_A=True, lora_B=True, routers=True, gate=False), (None, None, None)
    routing, projected = KERNELS.project(group)
    _, saved = KERNELS.expand(group, [y], [True], routing, projected)
    _, _, carried = KERNELS.expand_backward(group, [dy], nothing, routing, saved, needs)
    yield "project", lambda: KERNELS.project(group)
    yield "expand", lambda: KERNELS.expand(group, [y], [True], routing, projected)
    yield "expand, back", lambda: KERNELS.expand_backward(group, [dy], nothing, routing, saved, needs)
    yield "project, back", lambda: KERNELS.project_backward(group, dx, routing, saved, carried, needs)


def find_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run here, None where they can."""
    obstacle = select.find_obstacle(device.type, device.index, str(dtype))
    return obstacle and obstacle[1]
