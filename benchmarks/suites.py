"""What is measured: the cases of each suite, and which implementations run on them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import implementations
import stages as kernels
import torch
from implementations import Unavailable
from layers import Layer, Step, StepCase
from measure import Candidate
from model import SMALL_MODEL, ModelCase, build_models
from problem import Case, Problem
from training import SMALL_DECODER, TrainingCase, build_steps

NAMES = ("stages", "layer", "decoder", "scaling", "decode", "memory", "model", "training")
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
    def up(self) -> Case:
        return replace(self.square, d_out=11008)

    @property
    def down(self) -> Case:
        return replace(self.square, d_in=11008)

    @property
    def only_with_gpu(self) -> str | None:
        """Why what only a GPU can do in reasonable time is left out; None where it is not."""
        return None if self.gpu or self.quick else "it needs a GPU; --quick shows on a CPU that it works"

    def shape(self, case: Case) -> Case:
        """The case itself, or with ``quick`` a small one in its place."""
        if not self.quick:
            return case
        d_in, d_out = (max(d // 16, 256) for d in (case.d_in, case.d_out))
        return replace(case, d_in=d_in, d_out=d_out, L=max(case.L // 16, 1))

    def each_dtype(self, case: Case, own: Iterable[torch.dtype] | None = None) -> list[Case]:
        """The case in the dtypes asked for, else in ``own``, else in what is usual on the device."""
        return [replace(self.shape(case), dtype=dtype) for dtype in self.dtypes or own or (self.usual,)]

    @property
    def usual(self) -> torch.dtype:
        return torch.bfloat16 if self.gpu else torch.float32


@dataclass(frozen=True)
class Group:
    """Candidates that are timed together, round by round.

    Attributes:
        build: makes the candidates; reports what it leaves out, and why, to the function it is given.
        rounds: see ``measure.interleave``; 0: nothing is timed.
        weight: its share in the time there is, about the seconds it takes: on two cores, or on one GPU.
        note: what the rows must not be read without.
        threads: on a CPU, if not as many as there are.
    """

    suite: str
    title: str
    build: Callable[[Callable[[str], None]], list[Candidate]]
    rounds: int
    weight: float
    note: str | None = None
    threads: int | None = None


def groups(suite: str, setting: Setting) -> Iterator[Group]:
    """The groups of one suite."""
    named = (stages, layer, decoder, scaling, decode, memory, model, training)
    return next(found for found in named if found.__name__ == suite)(setting)


def stages(setting: Setting) -> Iterator[Group]:
    """What the device does at best, and each stage of the Triton kernels in a training step."""
    obstacle = setting.only_with_gpu or kernels.find_obstacle(setting.device, torch.bfloat16)
    if obstacle:
        yield left_out("stages", obstacle)
        return
    size, n, sets = (1 << 20, 256, 1) if setting.quick else (kernels.COPIED, kernels.MULTIPLIED, kernels.SETS)
    shapes = (Case(2, 10, 32, 24),) if setting.quick else (setting.square, setting.up, setting.down)
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


def layer(setting: Setting) -> Iterator[Group]:
    """Forward, and forward+backward, of one layer."""
    all_fit = setting.quick or setting.gpu
    for case in setting.each_dtype(setting.square, BOTH):
        yield one(setting, "layer", case, applicable(case), rounds=5, weight=24 if case.dtype == torch.float32 else 32)
    for case in setting.each_dtype(replace(setting.square, dropout=PAPER_DROPOUT), BOTH):
        yield one(setting, "layer", case, applicable(case) if all_fit else FEW, rounds=5, weight=12)
    dropout = PAPER_DROPOUT if setting.gpu else 0.0
    for start in (setting.up, setting.down):
        for case in setting.each_dtype(replace(start, dropout=dropout)):
            yield one(setting, "layer", case, applicable(case) if all_fit else FEW, rounds=3, weight=14)
    if setting.gpu:
        for case in setting.each_dtype(replace(setting.square, dropout=PAPER_DROPOUT, E=32, r=8)):
            yield one(setting, "layer", case, applicable(case), rounds=5, weight=5)
    for case in setting.each_dtype(SMALL, BOTH[:1]):
        yield one(setting, "layer", case, applicable(case, "compiled"), rounds=20, weight=15)


def decoder(setting: Setting) -> Iterator[Group]:
    """Forward, and forward+backward, of a whole decoder through PEFT, where siblings share; on one thread of a CPU."""
    for start in DECODERS[:1] if setting.quick else DECODERS:
        for dtype in setting.dtypes or (torch.float32,):
            case = replace(start, dtype=dtype, **(SMALL_DECODER if setting.quick else {}))
            build = partial(build_steps, case, DECODER_NAMES, setting.device, setting.seed)
            yield Group("decoder", case.name, build, rounds=5, weight=1 if setting.quick else 16, threads=1)


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
        build = partial(build_layers, setting, entries)
        yield Group("scaling", f"{start.d_in}→{start.d_out}, {len(cases)} points", build, rounds=5, weight=20)


def decode(setting: Setting) -> Iterator[Group]:
    """One token a step, the routing kept (``published`` routes every step anew); on a GPU in CUDA graphs."""
    for case in setting.each_dtype(DECODE):
        yield one(setting, "decode", case, applicable(case), rounds=20, weight=6)
    if setting.only_with_gpu:
        yield left_out("decode", f"a whole step: {setting.only_with_gpu}")
        return
    for dtype in setting.dtypes or (setting.usual,):
        for B, (E, r) in ((8, POOLS[0]), (1, POOLS[0]), (8, POOLS[1])):
            case = step_case(setting, dtype, B, E, r)
            build = partial(build_step, setting, case, ("base", "peft_lora", "eager", "mixlora"))
            yield Group("decode", case.name, build, rounds=20, weight=5)


def memory(setting: Setting) -> Iterator[Group]:
    """Peak memory of cases of the suite ``layer``, beside one another."""
    for start in (setting.square, replace(setting.square, dropout=PAPER_DROPOUT)):
        for case in setting.each_dtype(start, BOTH):
            names = [name for name in applicable(case) if not case.dropout or name in FEW]
            yield one(setting, "memory", case, names, rounds=0, weight=1)


def model(setting: Setting) -> Iterator[Group]:
    """A LLaVA, adapted in every projection of its decoder: one training step, and a short generation."""
    for case in setting.each_dtype(setting.square):
        whole = ModelCase(**(SMALL_MODEL if setting.quick else {}), dtype=case.dtype)
        build = partial(build_models, whole, applicable(case), setting.device, setting.seed)
        yield Group("model", whole.name, build, rounds=5, weight=12)


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
                build = partial(build_steps, case, names, setting.device, setting.seed)
                weight = 2 if setting.quick else 45 if checkpointing else 15
                yield Group("training", case.name, build, rounds=3, weight=weight)


def left_out(suite: str, reason: str) -> Group:
    """Nothing but a line that says why."""

    def build(report):
        report(f"left out: {reason}")
        return []

    return Group(suite, "left out", build, rounds=0, weight=0.01)


def applicable(case: Case, *asked_for: str) -> list[str]:
    """All implementations, but ``compiled`` only if asked for: compiling takes longer than most measurements."""
    left_out = {"compiled"} - set(asked_for)
    if case.dtype == torch.float32:
        left_out.add("peft_lora_base_dtype")  # the same as peft_lora
    return [name for name in implementations.NAMES if name not in left_out]


def step_case(setting: Setting, dtype: torch.dtype, B: int, E: int, r: int) -> StepCase:
    blocks, hidden, wide = (1, 256, 688) if setting.quick else (3, 4096, 11008)
    return StepCase(B, blocks, hidden, wide, dtype, E, r)


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


def build_step(setting: Setting, case: StepCase, names: Iterable[str], report: Callable[[str], None]) -> list[Step]:
    """The candidates of one group: all have the same frozen weights."""
    seeds = range(setting.seed, setting.seed + 7 * case.blocks)
    problems = [Problem(layer, setting.device, seed) for layer, seed in zip(case.cases(), seeds)]
    return [
        Step(name, case, [Layer(name, problem, implementations.build(name, problem)) for problem in problems])
        for name in names
    ]
