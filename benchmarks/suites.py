"""What is measured: the cases of each suite, and which implementations run on them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import implementations
import torch
from implementations import Unavailable
from layers import Layer
from measure import Candidate
from model import SMALL_MODEL, ModelCase, build_models
from problem import Case, Problem

NAMES = ("layer", "scaling", "decode", "memory", "model")
BOTH = (torch.float32, torch.bfloat16)

# LLaVA-7B's projections; E 16, r 4.
SQUARE = Case(4, 320, 4096, 4096)
UP = Case(4, 320, 4096, 11008)
DOWN = Case(4, 320, 11008, 4096)
SMALL = Case(8, 64, 512, 512)
DECODE = Case(8, 1, 4096, 4096, kept=True)
PAPER_DROPOUT = 0.05

# The few that the claims are about, for cases where all of them would take too long on a CPU.
FEW = ("base", "peft_lora", "mixlora")


@dataclass(frozen=True)
class Setting:
    """What the command line says of all suites."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...] | None  # None: each case's own
    quick: bool
    seed: int

    def shape(self, case: Case) -> Case:
        """The case itself, or with ``quick`` a small one in its place."""
        if not self.quick:
            return case
        d_in, d_out = (max(d // 16, 256) for d in (case.d_in, case.d_out))
        return replace(case, d_in=d_in, d_out=d_out, L=max(case.L // 16, 1))

    def each_dtype(self, case: Case, own: Iterable[torch.dtype] | None = None) -> list[Case]:
        """The case in the dtypes asked for, else in ``own``, else in what is usual on the device."""
        usual = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return [replace(self.shape(case), dtype=dtype) for dtype in self.dtypes or own or (usual,)]


@dataclass(frozen=True)
class Group:
    """Candidates that are timed together, round by round.

    Attributes:
        build: makes the candidates; reports what it leaves out, and why, to the function it is given.
        rounds: see ``measure.interleave``; 0: nothing is timed.
        weight: its share in the time there is, about the seconds it takes on two cores.
    """

    suite: str
    title: str
    build: Callable[[Callable[[str], None]], list[Candidate]]
    rounds: int
    weight: float


def groups(suite: str, setting: Setting) -> Iterator[Group]:
    """The groups of one suite."""
    return {"layer": layer, "scaling": scaling, "decode": decode, "memory": memory, "model": model}[suite](setting)


def layer(setting: Setting) -> Iterator[Group]:
    """Forward, and forward+backward, of one layer."""
    all_fit = setting.quick or setting.device.type == "cuda"
    for case in setting.each_dtype(SQUARE, BOTH):
        yield one(setting, "layer", case, applicable(case), rounds=5, weight=22 if case.dtype == torch.float32 else 32)
    for case in setting.each_dtype(replace(SQUARE, dropout=PAPER_DROPOUT), BOTH):
        yield one(setting, "layer", case, applicable(case) if all_fit else FEW, rounds=5, weight=12)
    for case in (*setting.each_dtype(UP), *setting.each_dtype(DOWN)):
        yield one(setting, "layer", case, applicable(case) if all_fit else FEW, rounds=3, weight=14)
    for case in setting.each_dtype(SMALL, BOTH[:1]):
        yield one(setting, "layer", case, applicable(case, compiled=True), rounds=20, weight=15)


def scaling(setting: Setting) -> Iterator[Group]:
    """The cost of ``mixlora`` against each of E, r, tokens and instances, all timed together."""
    tokens = SQUARE.L if setting.device.type == "cuda" else SQUARE.L // 2  # half, so that a CPU has time for rounds
    for start in setting.each_dtype(replace(SQUARE, L=tokens)):
        sweeps = (
            *(replace(start, E=E) for E in (8, 16, 32, 64)),
            *(replace(start, r=r) for r in (2, 4, 8)),
            *(replace(start, L=start.L // part) for part in (4, 2, 1)),
            *(replace(start, B=B, L=start.B * start.L // B) for B in (1, 4, 16)),
        )
        cases = dict.fromkeys(sweeps)  # each once
        products = {case.product: case for case in cases}.values()
        entries = [(replace(case, label=f"{case.B * case.L} tokens"), "base") for case in products]
        entries += [(replace(case, label=f"E {case.E}, r {case.r}, {case.B}×{case.L}"), "mixlora") for case in cases]
        build = partial(build_layers, setting, entries)
        yield Group("scaling", f"{start.d_in}→{start.d_out}, {len(cases)} points", build, rounds=5, weight=20)


def decode(setting: Setting) -> Iterator[Group]:
    """One token a step, the routing kept (``published`` routes every step anew)."""
    for case in setting.each_dtype(DECODE):
        yield one(setting, "decode", case, applicable(case), rounds=20, weight=6)


def memory(setting: Setting) -> Iterator[Group]:
    """Peak memory of cases of the suite ``layer``, beside one another."""
    for start in (SQUARE, replace(SQUARE, dropout=PAPER_DROPOUT)):
        for case in setting.each_dtype(start, BOTH):
            names = [name for name in applicable(case) if not case.dropout or name in FEW]
            yield one(setting, "memory", case, names, rounds=0, weight=1)


def model(setting: Setting) -> Iterator[Group]:
    """A LLaVA, adapted in every projection of its decoder: one training step, and a short generation."""
    for case in setting.each_dtype(SQUARE):
        whole = ModelCase(**(SMALL_MODEL if setting.quick else {}), dtype=case.dtype)
        build = partial(build_models, whole, applicable(case), setting.device, setting.seed)
        yield Group("model", whole.name, build, rounds=5, weight=12)


def applicable(case: Case, compiled: bool = False) -> list[str]:
    """All implementations; ``compiled`` only if asked for, because compiling takes longer than most measurements."""
    left_out = set() if compiled else {"compiled"}
    if case.dtype == torch.float32:
        left_out.add("peft_lora_base_dtype")  # the same as peft_lora
    return [name for name in implementations.NAMES if name not in left_out]


def one(setting: Setting, suite: str, case: Case, names: Iterable[str], rounds: int, weight: float) -> Group:
    build = partial(build_layers, setting, [(case, name) for name in names])
    return Group(suite, case.name, build, rounds, weight)


def build_layers(setting: Setting, entries: list[tuple[Case, str]], report: Callable[[str], None]) -> list[Layer]:
    """The candidates of one group; all have the same frozen weight."""
    problems: dict[Case, Problem] = {}
    candidates, linear = [], None
    for case, name in entries:
        if case not in problems:
            problems[case] = Problem(case, setting.device, setting.seed, linear)
            linear = problems[case].linear
        try:
            candidates.append(Layer(name, problems[case], implementations.build(name, problems[case])))
        except Unavailable as error:
            report(f"{name} left out: {error}")
    return candidates
