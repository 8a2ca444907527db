"""Compile every Triton kernel for GPUs that need not be present, and report what each costs.

    python benchmarks/compile_report.py [--quick] [--targets sm_90 ...] [--kernels project ...]

The stages are called with tensors of no memory, on the groups of siblings of a 7B and a 13B model. Triton compiles what
they launch for the target, and gives each compiled kernel to a driver that runs nothing, but looks at it: registers,
spilled bytes, shared memory, the matrix instructions found. The exit status is 1 if a kernel spills, wants more shared
memory than the target has, or if ``project`` does without Hopper's matrix unit on sm_90 although its tile is large
enough for it; and if nothing was compiled.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from launching.stand_in import Driver
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.driver import driver as drivers

from mixlora_kernels.backends.base import Factors, FrozenLinear, Group, Needs, Options
from mixlora_kernels.backends.kernels import decode, expand, expand_backward, project, project_backward, tuning
from mixlora_kernels.backends.kernels.launch import Op
from mixlora_kernels.routing import Instances, Routing

GROUPS = [
    (4096, (4096, 4096, 4096)), (4096, (4096,)), (4096, (11008, 11008)), (11008, (4096,)),
    (5120, (5120, 5120, 5120)), (5120, (5120,)), (5120, (13824, 13824)), (13824, (5120,)),
]  # fmt: skip
POOLS = [(16, 4), (32, 8), (64, 16), (128, 64)]


class Mode(NamedTuple):
    """What a call computes, as far as other kernels are compiled for it."""

    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.05
    packed: bool = False
    conditioning: str = "factors"
    gate: str = "straight_through"


MODES = [
    Mode(),
    Mode(dropout=0.0),
    Mode(packed=True, conditioning="tied", gate="normalized"),
    Mode(conditioning="published", gate="weighted"),
    Mode(dtype=torch.float32),
]
TOKENS = (16, 800)  # instances, and tokens in each
HOPPER_ROWS = 64  # of a tile, from which on the matrix unit of sm_90 takes it


class Target(NamedTuple):
    gpu: GPUTarget
    shared: int  # bytes of shared memory that one program may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536),
}


def launch_everything(D: int, widths: tuple[int, ...], E: int, r: int, mode: Mode) -> None:
    """One step of training and one of decoding of a group, with tensors on the meta device."""
    B, L = TOKENS
    N, tied = B * L, mode.conditioning == "tied"

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, device="meta", dtype=dtype)

    x = empty(N, D, dtype=mode.dtype)
    factors = [
        Factors(empty(E, D), empty(E, O), empty(E, D), *((None, None) if tied else (empty(E, D), empty(r, E, D))))
        for O in widths
    ]
    instances = Instances(B, L, mask=empty(N, dtype=torch.bool), mean_weights=empty(B, 1))
    if mode.packed:
        instances = instances._replace(
            length=None, cu_seqlens=empty(B + 1, dtype=torch.int64), segment=empty(N, dtype=torch.int64)
        )
    conditioning = mode.conditioning if mode.conditioning in ("factors", "published") else None
    options = Options(r, 8.0, mode.dropout, mode.gate, conditioning, tied, True, mode.dtype)
    seeds = empty(len(widths), dtype=torch.int64) if mode.dropout else None
    bases = [FrozenLinear(empty(O, D, dtype=mode.dtype), None) for O in widths]
    group, needs = Group(x, bases, factors, None, None, seeds, instances, options), Needs(*[True] * 4, gate=False)

    routing, saved = project(group)
    ys = [empty(N, O, dtype=mode.dtype) for O in widths]
    ys, saved = expand(group, ys, [True] * len(ys), routing, saved)
    _, _, carried = expand_backward(group, ys, (None, None, None), routing, saved, needs)
    project_backward(group, x, routing, saved, carried, needs)
    step = Instances(B, 1)
    kept = Routing(*routing[:3], None, None)
    decode(group._replace(x=x[:B], instances=step, given=kept, seeds=None, bases=[y[:B] for y in ys]))


class Cost(NamedTuple):
    registers: int
    spilled: int  # bytes of local memory
    instructions: str  # the matrix instructions found


def measure_cuda(files: dict[str, str]) -> Cost:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage, sass = (
        subprocess.run([tool, option, files["cubin"]], check=True, capture_output=True, text=True).stdout
        for option in ("--dump-resource-usage", "-sass")
    )
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Cost(registers, stack + local, find(r"\b(\w*GMMA|HMMA|UTC\w*MMA)\b", sass))


def measure_hip(files: dict[str, str]) -> Cost:
    assembly = Path(files["amdgcn"]).read_text(encoding="utf-8")
    registers, spilled = (
        sum(int(n) for n in re.findall(rf"\.{name}_count: *(\d+)", assembly)) for name in ("vgpr", "vgpr_spill")
    )
    return Cost(registers, 4 * spilled, find(r"\bv_(mfma)_\w+", assembly).upper())


def find(pattern: str, text: str) -> str:
    return " ".join(sorted(set(re.findall(pattern, text)))) or "-"


class Kernel(NamedTuple):
    """One kernel as Triton specialised and compiled it.

    Attributes:
        constants: its arguments that are constants, by name. signature: the types of all, in Triton's words.
    """

    name: str
    signature: dict[str, object]
    constants: dict[str, object]
    num_warps: int
    shared: int
    cost: Cost


class Compiler(Driver):
    """A driver of one target after another. It hands on each kernel that Triton compiled for it and would now load."""

    def __init__(self, hand_on: Callable[[Kernel], None], wanted: list[str] | None):
        super().__init__()
        self.hand_on, self.sources = hand_on, {}
        self.utils.shared = sys.maxsize  # Triton would refuse a kernel that wants more; here it is a fault
        triton.knobs.runtime.jit_cache_hook = lambda *, fn, **_: bool(wanted) and short_name(fn.name) not in wanted

    def turn_to(self, name: str) -> None:
        self.device, self.target = list(TARGETS).index(name), TARGETS[name].gpu  # Triton keeps kernels by device

    def launcher_cls(self, source, metadata) -> Callable:
        self.sources[metadata.hash] = source, metadata
        return lambda *_: None

    def read(self, name: str, files: dict[str, str], key: str) -> None:
        source, metadata = self.sources.pop(key)
        constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
        measure = measure_hip if self.target.backend == "hip" else measure_cuda
        cost = measure({file.removeprefix(f"{name}."): path for file, path in files.items()})
        shared, warps = metadata.shared, metadata.num_warps
        self.hand_on(Kernel(short_name(name), source.signature, constants, warps, shared, cost))


def short_name(name: str) -> str:
    return name.removesuffix("_kernel")


def find_fault(kernel: Kernel, name: str, target: Target) -> str | None:
    if kernel.cost.spilled:
        return f"spills {kernel.cost.spilled} bytes"
    if kernel.shared > target.shared:
        return f"{kernel.shared} bytes of shared memory, {target.shared} there"
    if name == "sm_90" and kernel.name == "project" and "GMMA" not in kernel.cost.instructions:
        half = kernel.signature["x"] in ("*bf16", "*fp16")  # products of float32 are exact, and not the unit's
        if half and kernel.constants["BLOCK_N"] >= HOPPER_ROWS:
            return "does not use the matrix unit"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="of these kernels alone, such as project")
    parser.add_argument("--quick", action="store_true", help="one group, bfloat16, with dropout, and two pools")
    options = parser.parse_args()
    cases = [(D, widths, MODES[0]) for D, widths in (GROUPS[:1] if options.quick else GROUPS)]
    if not options.quick:
        cases += [(*GROUPS[0], mode) for mode in MODES[1:]]
    row = "{:24} {:7} {:>3} {:>3} {:>9} {:>8} {:>8} {:>8}  {:20} {}"
    print(row.format("kernel", "target", "E", "R", "tile", "warps", "regs", "shared", "instructions", "fault"))
    verdicts: list[str | None] = []  # a fault or None for each variant

    def show(kernel: Kernel) -> None:
        fault = find_fault(kernel, name, TARGETS[name])
        verdicts.append(fault)
        tile = "x".join(str(kernel.constants[k]) for k in ("BLOCK_N", "BLOCK_D", "BLOCK_W") if k in kernel.constants)
        cost = kernel.cost
        print(row.format(
            kernel.name, name, E, r, tile, kernel.num_warps, cost.registers, kernel.shared, cost.instructions,
            fault or "",
        ), flush=True)  # fmt: skip

    compiler, run = Compiler(show, options.kernels), JITFunction.run
    drivers.set_active(compiler)
    ops_run = mock.patch.object(Op, "on", lambda op, x: op.run)  # on meta an op only allocates
    # A launch would keep what was compiled for the first target.
    nothing_is_kept = mock.patch.object(JITFunction, "run", lambda *args, **kwargs: (run(*args, **kwargs), None)[1])
    for name in options.targets:
        compiler.turn_to(name)
        with ops_run, nothing_is_kept, mock.patch.object(tuning, "architecture", return_value=name):
            for E, r in POOLS[:2] if options.quick else POOLS:
                for D, widths, mode in cases:
                    launch_everything(D, widths, E, r, mode)
    faults = sum(fault is not None for fault in verdicts)
    print(f"{len(verdicts)} variants, {faults} faults")
    return 1 if faults or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
