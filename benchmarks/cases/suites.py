"""What is measured: each suite's cases, and which implementations run on them.

A suite is a function that yields its groups, marked with ``suite``; to add one, write it. To add a case, yield it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from harness.rounds import Group

from . import stages as kernels
from .implementations import IMPLEMENTATIONS
from .layers import StepCase, build_layers, build_step
from .model import SMALL_MODEL, ModelCase, build_models
from .problem import Case
from .training import SMALL_DECODER, TrainingCase, build_steps

BOTH = (torch.float32, torch.bfloat16)

SMALL = Case(8, 64, 512, 512)
DECODE = Case(8, 1, 4096, 4096, kept=True)
PAPER_DROPOUT = 0.05
POOLS = ((16, 4), (32, 8))  # E, r

# The few that the claims are about, for cases where all of them would take too long.
FEW = ("base", "peft_lora", "mixlora")
WHOLE_MODELS = ("base", "peft_lora", "eager", "published", "mixlora")
DECODER_NAMES = ("base", "peft_lora", "mixlora_single", "mixlora", "mixlora_tied")
DECODERS = tuple(
    TrainingCase(B, L, hidden, hidden * 43 // 16, layers, hidden // 64, 64, checkpointing=False, updates=False)
    for B, L, hidden, layers in ((8, 64, 512, 2), (2, 128, 2048, 1))
)


@dataclass(frozen=True)
class Setting:
    """What the command line says of all suites."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...] | None  # None: each case's own
    quick: bool
    seed: int

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def square(self) -> Case:
        """LLaVA-7B's projection 4096→4096, with the tokens of the paper's batch where a GPU makes it possible."""
        B, L = (16, 800) if self.gpu else (4, 320)
        return Case(B, L, 4096, 4096)

    @property
    def only_with_gpu(self) -> str | None:
        """Why what only a GPU can do in reasonable time is left out; None where it is not."""
        return None if self.gpu or self.quick else "it needs a GPU; --quick shows on a CPU that it works"

    @property
    def usual(self) -> torch.dtype:
        return torch.bfloat16 if self.gpu else torch.float32

    def shape(self, case: Case) -> Case:
        """The case itself, or with ``quick`` a small one in its place."""
        if not self.quick:
            return case
        d_in, d_out = (max(d // 16, 256) for d in (case.d_in, case.d_out))
        return replace(case, d_in=d_in, d_out=d_out, L=max(case.L // 16, 1))

    def each_dtype(self, case: Case, own: Iterable[torch.dtype] | None = None) -> list[Case]:
        """The case in the dtypes asked for, else in ``own``, else in what is usual on the device."""
        return [replace(self.shape(case), dtype=dtype) for dtype in self.dtypes or own or (self.usual,)]

    def group(self, suite: str, case, build: Callable, *arguments, rounds: int, weight: float, **more) -> Group:
        """``build(*arguments, device, seed, report)`` makes the candidates."""
        build = partial(build, *arguments, self.device, self.seed)
        return Group(suite, getattr(case, "name", case), build, rounds, weight, **more)

    def one(self, suite: str, case: Case, names: Iterable[str], rounds: int, weight: float) -> Group:
        """A layer under implementations of those names."""
        return self.group(suite, case, build_layers, [(case, name) for name in names], rounds=rounds, weight=weight)


class Suite(NamedTuple):
    """A suite's groups under a setting, and what its rows must be read with."""

    groups: Callable[[Setting], Iterator[Group]]
    about: str | None


SUITES: dict[str, Suite] = {}


def suite(about: str | None = None):
    """Mark a function as the suite of its name."""

    def mark(groups: Callable[[Setting], Iterator[Group]]):
        SUITES[groups.__name__] = Suite(groups, about)
        return groups

    return mark


def left_out(suite: str, reason: str) -> Group:
    """Nothing but a line that says why."""
    return Group(suite, "left out", lambda report: report(f"left out: {reason}") or [], rounds=0, weight=0.01)


@suite(
    "A stage's bytes are the activations it reads and writes, and nothing else. Its share is that of a plain copy's "
    "bytes a second, in the same round."
)
def stages(setting: Setting) -> Iterator[Group]:
    """What the device does at best, and each stage of the Triton kernels in a training step."""
    obstacle = setting.only_with_gpu or kernels.find_obstacle(setting.device, torch.bfloat16)
    if obstacle:
        yield left_out("stages", obstacle)
        return
    size, n, sets = (1 << 20, 256, 1) if setting.quick else (kernels.COPIED, kernels.MULTIPLIED, kernels.SETS)
    wide = setting.square
    shapes = (Case(2, 10, 32, 24),) if setting.quick else (wide, replace(wide, d_out=11008), replace(wide, d_in=11008))
    shapes = [replace(shape, dtype=torch.bfloat16, dropout=PAPER_DROPOUT) for shape in shapes]

    def limits(report):
        case = replace(shapes[0], label="at best")
        return [kernels.copy(case, setting.device, size), kernels.product(case, setting.device, n)]

    def build(report, case: Case):
        return [kernels.copy(case, setting.device, size), *kernels.stages(case, setting.device, sets)]

    rounds, weight = (20, 4) if setting.gpu else (2, 1)
    yield Group("stages", "a copy and a product", limits, rounds, weight)
    note = None if setting.gpu else "in Triton's interpreter, where times mean nothing"
    for E, r in POOLS:
        for shape in shapes:
            case = replace(shape, E=E, r=r)
            case = replace(case, label=f"{case.name}, E {E}, r {r}")
            yield Group("stages", case.name, partial(build, case=case), rounds, weight, note)


@suite()
def layer(setting: Setting) -> Iterator[Group]:
    """Forward, and forward+backward, of one layer."""
    square, dropout = setting.square, PAPER_DROPOUT if setting.gpu else 0.0
    cases = [(square, BOTH, 5, 24), (replace(square, dropout=PAPER_DROPOUT), BOTH, 5, 12)]
    cases += [
        (replace(square, dropout=dropout, **change), None, 3, 14) for change in ({"d_out": 11008}, {"d_in": 11008})
    ]
    if setting.gpu:
        cases.append((replace(square, dropout=PAPER_DROPOUT, E=32, r=8), None, 5, 5))
    for start, own, rounds, weight in cases:
        all_fit = setting.quick or setting.gpu or start == square
        for case in setting.each_dtype(start, own):
            yield setting.one("layer", case, applicable(case) if all_fit else FEW, rounds, weight)
    for case in setting.each_dtype(SMALL, BOTH[:1]):
        yield setting.one("layer", case, applicable(case, compiled=True), rounds=20, weight=15)


@suite(
    "A LLaMA's decoder through `get_peft_model`, given hidden states that require a gradient, with a loss; on one "
    "thread of a CPU. `mixlora` computes layers that read the same x together, `mixlora_single` each by itself; "
    "`mixlora_tied` is the preset `tied()`."
)
def decoder(setting: Setting) -> Iterator[Group]:
    """Forward, and forward+backward, of a whole decoder through PEFT, where siblings share; on one thread of a CPU."""
    for start in DECODERS[:1] if setting.quick else DECODERS:
        for dtype in setting.dtypes or (torch.float32,):
            case = replace(start, dtype=dtype, **(SMALL_DECODER if setting.quick else {}))
            weight = 1 if setting.quick else 16
            yield setting.group("decoder", case, build_steps, case, DECODER_NAMES, rounds=5, weight=weight, threads=1)


@suite()
def scaling(setting: Setting) -> Iterator[Group]:
    """The cost of ``mixlora`` against each of E, r, tokens and instances, all timed together."""
    tokens = setting.square.L if setting.gpu else setting.square.L // 2  # half, so that a CPU has time for rounds
    for start in setting.each_dtype(replace(setting.square, L=tokens)):
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
        title = f"{start.d_in}→{start.d_out}, {len(cases)} points"
        yield setting.group("scaling", title, build_layers, entries, rounds=5, weight=20)


@suite(
    'The routing is kept. On a GPU a step is the replay of a CUDA graph. "A layer of n" is the mean of n projections, '
    "all of several blocks, run one after another."
)
def decode(setting: Setting) -> Iterator[Group]:
    """One token a step, the routing kept (``published`` routes every step anew); on a GPU in CUDA graphs."""
    for case in setting.each_dtype(DECODE):
        yield setting.one("decode", case, applicable(case), rounds=20, weight=6)
    if setting.only_with_gpu:
        yield left_out("decode", f"a whole step: {setting.only_with_gpu}")
        return
    for dtype in setting.dtypes or (setting.usual,):
        for B, (E, r) in ((8, POOLS[0]), (1, POOLS[0]), (8, POOLS[1])):
            case = step_case(setting, dtype, B, E, r)
            names = ("base", "peft_lora", "eager", "mixlora")
            yield setting.group("decode", case, build_step, case, names, rounds=20, weight=5)


@suite()
def memory(setting: Setting) -> Iterator[Group]:
    """Peak memory of cases of the suite ``layer``, beside one another."""
    for start in (setting.square, replace(setting.square, dropout=PAPER_DROPOUT)):
        for case in setting.each_dtype(start, BOTH):
            names = [name for name in applicable(case) if not case.dropout or name in FEW]
            yield setting.one("memory", case, names, rounds=0, weight=1)


@suite(
    "The error is taken in float32: over the logits and all gradients, and for a generation as the share of tokens "
    "that differ."
)
def model(setting: Setting) -> Iterator[Group]:
    """A LLaVA, adapted in every projection of its decoder: one training step, and a short generation."""
    for case in setting.each_dtype(setting.square):
        whole = ModelCase(**(SMALL_MODEL if setting.quick else {}), dtype=case.dtype)
        yield setting.group("model", whole, build_models, whole, applicable(case), rounds=5, weight=12)


@suite(
    "The text decoder, given hidden states that require a gradient, as LLaVA's projector gives it; random weights, "
    "shared by the implementations; `mixlora` and `peft_lora` through `get_peft_model`. The vision tower is left out: "
    "it costs all the same. A step is forward, loss, backward and AdamW. Peak memory is beyond the frozen model: "
    "activations, adapters, their gradients and the optimizer's state. The error is that of a model of two layers of "
    "the same widths in float32."
)
def training(setting: Setting) -> Iterator[Group]:
    """A training step of a decoder of LLaVA-7B's size."""
    if setting.only_with_gpu:
        yield left_out("training", setting.only_with_gpu)
        return
    for dtype in setting.dtypes or (setting.usual,):
        for E, r in POOLS:
            for checkpointing in (True, False):
                shape = SMALL_DECODER if setting.quick else {}
                case = TrainingCase(**shape, checkpointing=checkpointing, dropout=PAPER_DROPOUT, dtype=dtype, E=E, r=r)
                names = WHOLE_MODELS if (E, r) == POOLS[0] else FEW
                weight = 2 if setting.quick else 45 if checkpointing else 15
                yield setting.group("training", case, build_steps, case, names, rounds=3, weight=weight)


def applicable(case: Case, compiled: bool = False) -> list[str]:
    """All implementations of a layer; compiling takes longer than most measurements, and in float32 parameters in the
    frozen layer's dtype make no other implementation."""
    return [
        name
        for name, one in IMPLEMENTATIONS.items()
        if one.layers
        and (compiled or not one.compiles)
        and (case.dtype != torch.float32 or one.exact or one.kind != "lora")
    ]


def step_case(setting: Setting, dtype: torch.dtype, B: int, E: int, r: int) -> StepCase:
    blocks, hidden, wide = (1, 256, 688) if setting.quick else (3, 4096, 11008)
    return StepCase(B, blocks, hidden, wide, dtype, E, r)
