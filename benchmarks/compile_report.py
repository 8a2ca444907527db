"""Compile every Triton kernel for GPUs that need not be present, and report what each costs.

    python benchmarks/compile_report.py [--quick] [--targets sm_90 ...] [--kernels project ...]

The stages are called with tensors of no memory, on the groups of siblings of a 7B and a 13B model; each launch is
caught on its way, specialised as Triton would, and compiled for the target: registers, spilled bytes, shared memory,
the matrix instructions found. The exit status is 1 if a kernel spills, wants more shared memory than the target has,
or if ``project`` does without Hopper's matrix unit on sm_90 although its tile is large enough for it.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

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


class Variant(NamedTuple):
    """One kernel as Triton specialises it: what it has to compile anew for."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


def catch_launches(architecture: str, cases: list[tuple], E: int, r: int) -> list[Variant]:
    """The variants that these cases would launch on that architecture, without launching them."""
    caught = []

    def record(kernel, *, grid, warmup, **arguments):
        caught.append(specialise(kernel, arguments))

    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(JITFunction, "run", record))
        enter(mock.patch.object(tuning, "architecture", lambda device: architecture))
        enter(mock.patch.object(Op, "on", lambda op, x: op.run))  # as on a device; on meta an op only allocates
        for D, widths, mode in cases:
            launch_everything(D, widths, E, r, mode)
    return caught


def specialise(kernel: JITFunction, values: dict) -> Variant:
    """As Triton's launcher does: None and 1 are constants, what 16 divides is marked so; of a tuple, each item."""
    signature, constants, aligned = [], [], []

    def kind(value, parameter, path):
        if parameter.is_constexpr or value is None or (fixed(value) and not parameter.do_not_specialize):
            constants.append((path, value))
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(kind(item, parameter, (*path, i)) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            aligned.append(path)
            return "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).split(".")[-1]]
        if type(value) is int and value % 16 == 0 and not parameter.do_not_specialize:
            aligned.append(path)
        return {bool: "i1", int: "i32", float: "fp32"}[type(value)]

    for place, parameter in enumerate(kernel.params):
        signature.append((parameter.name, kind(values[parameter.name], parameter, (place,))))
    names = {parameter.name for parameter in kernel.params}
    options = sorted((name, value) for name, value in values.items() if name not in names)
    return Variant(kernel, tuple(signature), tuple(constants), tuple(aligned), tuple(options))


def fixed(value) -> bool:
    return type(value) is int and value == 1


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
    shared: int
    instructions: str  # the matrix instructions found


def compile_variant(variant: Variant, target: Target) -> Cost:
    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs={path: [["tt.divisibility", 16]] for path in variant.aligned},
    )
    compiled = triton.compile(source, target=target.gpu, options=dict(variant.options))
    measure = measure_hip if target.gpu.backend == "hip" else measure_cuda
    return measure(compiled)


def measure_cuda(compiled) -> Cost:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Cost(registers, stack + local, compiled.metadata.shared, find(r"\b(\w*GMMA|HMMA|UTC\w*MMA)\b", sass))


def measure_hip(compiled) -> Cost:
    assembly = compiled.asm["amdgcn"]
    registers, spilled = (
        sum(int(n) for n in re.findall(rf"\.{name}_count: *(\d+)", assembly)) for name in ("vgpr", "vgpr_spill")
    )
    return Cost(registers, 4 * spilled, compiled.metadata.shared, find(r"\bv_(mfma)_\w+", assembly).upper())


def find(pattern: str, text: str) -> str:
    return " ".join(sorted(set(re.findall(pattern, text)))) or "-"


def short_name(variant: Variant) -> str:
    return variant.kernel.__name__.removesuffix("_kernel")


def named_constants(variant: Variant) -> dict[str, object]:
    return {variant.kernel.params[path[0]].name: value for path, value in variant.constants}


def find_fault(variant: Variant, name: str, target: Target, cost: Cost) -> str | None:
    constants = named_constants(variant)
    if cost.spilled:
        return f"spills {cost.spilled} bytes"
    if cost.shared > target.shared:
        return f"{cost.shared} bytes of shared memory, {target.shared} there"
    if name == "sm_90" and variant.kernel.__name__ == "project_kernel" and "GMMA" not in cost.instructions:
        half = dict(variant.signature)["x"] in ("*bf16", "*fp16")  # products of float32 are exact, and not the unit's
        if half and constants["BLOCK_N"] >= HOPPER_ROWS:
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
    seen, faults = set(), 0
    for name in options.targets:
        for E, r in POOLS[:2] if options.quick else POOLS:
            for variant in catch_launches(name, cases, E, r):
                if (name, variant) in seen or short_name(variant) not in (options.kernels or [short_name(variant)]):
                    continue
                seen.add((name, variant))
                cost = compile_variant(variant, TARGETS[name])
                fault = find_fault(variant, name, TARGETS[name], cost)
                faults += fault is not None
                constants, settings = named_constants(variant), dict(variant.options)
                tile = "x".join(str(constants[k]) for k in ("BLOCK_N", "BLOCK_D", "BLOCK_W") if k in constants)
                print(row.format(
                    short_name(variant), name, E, r,
                    tile, settings["num_warps"], cost.registers, cost.shared, cost.instructions, fault or "",
                ), flush=True)  # fmt: skip
    print(f"{len(seen)} variants, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
