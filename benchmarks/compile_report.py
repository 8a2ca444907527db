"""Compile every Triton kernel for GPUs that need not be present, and report what each costs.

    python benchmarks/compile_report.py [--quick] [--targets sm_90 ...]

The stages are called with tensors of no memory, at the shapes of a 7B and a 13B model; each launch is caught on its
way, specialised as Triton would, and compiled for the target: registers, spilled bytes, shared memory, the matrix
instructions found. The exit status is 1 if a kernel spills, wants more shared memory than the target has, or if
``project`` does without Hopper's matrix unit on sm_90 although its tile is large enough for it.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from mixlora_kernels.backends.torch.dropout import dropped_levels
from mixlora_kernels.backends.triton import tuning
from mixlora_kernels.backends.triton.decode import launch_decode
from mixlora_kernels.backends.triton.expand import launch_expand, launch_expand_backward
from mixlora_kernels.backends.triton.project import launch_project, launch_project_backward
from mixlora_kernels.backends.triton.route import launch_route, launch_route_backward
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

WIDTHS = [(4096, 4096), (4096, 11008), (11008, 4096), (5120, 5120), (5120, 13824), (13824, 5120)]
POOLS = [(16, 4), (32, 8)]
OTHER_MODES = [  # dtype of x, dropout, packed
    (torch.bfloat16, 0.0, False),
    (torch.bfloat16, 0.05, True),
    (torch.float32, 0.05, False),
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

    def record(kernel, *args, grid, warmup, **keywords):
        caught.append(specialise(kernel, args, keywords))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(tuning, "architecture", lambda device: architecture),
    ):
        for D, O, *mode in cases:
            launch_everything(D, O, E, r, *mode)
    return caught


def specialise(kernel: JITFunction, args: tuple, keywords: dict) -> Variant:
    """As Triton's launcher does: None and 1 are constants, what 16 divides is marked so."""
    values = dict(zip((p.name for p in kernel.params), args)) | keywords
    signature, constants, aligned = [], [], []
    for place, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        fixed = parameter.is_constexpr or value is None
        if fixed or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        if isinstance(value, torch.Tensor):
            kind = "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).split(".")[-1]]
        else:
            kind = {bool: "i1", int: "i32", float: "fp32"}[type(value)]
        if kind.startswith("*") or (kind == "i32" and value % 16 == 0 and not parameter.do_not_specialize):
            aligned.append(place)
        signature.append((parameter.name, kind))
    return Variant(kernel, tuple(signature), tuple(constants), tuple(aligned), tuple(sorted(values.items())))


def launch_everything(D: int, O: int, E: int, r: int, dtype: torch.dtype, dropout: float, packed: bool) -> None:
    """One step of training and one of decoding with tensors on the meta device, kernel by kernel."""
    B, L = TOKENS
    N, dropped, scale = B * L, dropped_levels(dropout), 8.0
    real = {"device": "meta", "dtype": torch.float32}
    x, y = torch.empty(N, D, device="meta", dtype=dtype), torch.empty(N, O, device="meta", dtype=dtype)
    lora_A, lora_B, routers = torch.empty(E, D, **real), torch.empty(E, O, **real), torch.empty(2 * E, D, **real)
    mask = torch.empty(N, device="meta", dtype=torch.bool)
    cu_seqlens = torch.empty(B + 1, device="meta", dtype=torch.int64) if packed else None
    seed = torch.empty(1, device="meta", dtype=torch.int64) if dropout else None
    table = torch.empty(r, E, E, **real)
    chosen = (torch.empty(B, r, device="meta", dtype=torch.int64) for _ in "ab")

    u, sums = launch_project(x, lora_A, routers, cu_seqlens, mask, seed, B, L, dropped)
    routed = launch_route(sums, table, cu_seqlens, mask, B, L, tuning.rows(N), r, "weighted")
    gate, probs_a, probs_b, p_ifs, p_cfs, q, share = routed[2:]
    index_a, index_b = chosen
    launch_expand(y, None, u, lora_B, index_a, index_b, gate, scale, cu_seqlens, B, L)
    du, _, dgate = launch_expand_backward(y, u, lora_B, index_a, index_b, gate, scale, cu_seqlens, B, L, True, True)
    dlogits, _ = launch_route_backward(
        dgate, None, None, index_a, index_b, probs_a, probs_b, p_ifs, p_cfs, q, share, "weighted"
    )
    launch_project_backward(
        x, x, du, lora_A, index_a, dlogits, routers, cu_seqlens, mask, seed, B, L, dropped, False, True
    )
    launch_decode(y[:1], x[:1], lora_A, lora_B, index_a, index_b, gate, scale, None, 1)


class Cost(NamedTuple):
    registers: int
    spilled: int  # bytes of local memory
    shared: int
    instructions: str  # the matrix instructions found


def compile_variant(variant: Variant, target: Target) -> Cost:
    names = [p.name for p in variant.kernel.params]
    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs={(names.index(name),): value for name, value in variant.constants},
        attrs={(place,): [["tt.divisibility", 16]] for place in variant.aligned},
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


def find_fault(variant: Variant, name: str, target: Target, cost: Cost) -> str | None:
    constants = dict(variant.constants)
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
    parser.add_argument("--quick", action="store_true", help="one layer, bfloat16, with dropout")
    options = parser.parse_args()
    widths = WIDTHS[:1] if options.quick else WIDTHS
    cases = [(D, O, torch.bfloat16, 0.05, False) for D, O in widths]
    if not options.quick:
        cases += [(*widths[0], *mode) for mode in OTHER_MODES]
    row = "{:24} {:7} {:>3} {:>3} {:>9} {:>8} {:>8} {:>8}  {:20} {}"
    print(row.format("kernel", "target", "E", "R", "tile", "warps", "regs", "shared", "instructions", "fault"))
    seen, faults = set(), 0
    for name in options.targets:
        for E, r in POOLS:
            for variant in catch_launches(name, cases, E, r):
                if (name, variant) in seen:
                    continue
                seen.add((name, variant))
                cost = compile_variant(variant, TARGETS[name])
                fault = find_fault(variant, name, TARGETS[name], cost)
                faults += fault is not None
                constants, settings = dict(variant.constants), dict(variant.options)
                tile = "x".join(
                    str(constants[k]) for k in ("BLOCK_N", "BLOCK_D", "BLOCK_O", "BLOCK_W") if k in constants
                )
                print(row.format(
                    variant.kernel.__name__.removesuffix("_kernel"), name, E, r,
                    tile, settings["num_warps"], cost.registers, cost.shared, cost.instructions, fault or "",
                ), flush=True)  # fmt: skip
    print(f"{len(seen)} variants, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
