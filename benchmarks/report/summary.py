"""The claims that the benchmark answers, each read off the rows."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

import torch
from cases.problem import Shaped, dtype_name
from cases.suites import BOTH, DECODE, DECODERS, PAPER_DROPOUT, POOLS, SMALL, Setting, step_case
from harness.measure import paired_ratio

from .text import bar

TRAINING = "forward+backward"


def summarise(rows: Sequence[dict], setting: Setting) -> list[dict]:
    """The bars that the rows can answer: claim, measured, bar, met (None with ``quick``, where shapes are too small
    for the claim to mean anything). Those of a CPU and those of a GPU differ; ``quick`` shows both on a CPU."""
    bars = [*scaling_bars(rows, setting), *memory_bars(rows), *error_bars(rows)]
    if setting.gpu or setting.quick:
        bars = [*gpu_bars(rows, setting), *bars]
    if not setting.gpu:
        bars = [*layer_bars(rows, setting), *decoder_bars(rows), *bars]
    return [bar | ({"met": None} if setting.quick else {}) for bar in bars]


def find(rows: Sequence[dict], suite: str, case: Shaped, implementation: str, which: str) -> dict | None:
    wanted = {"suite": suite, "implementation": implementation, "pass": which} | case.fields
    del wanted["case"]  # its label may differ
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def ratio_bars(row: dict | None, claim: str, **limits: float) -> Iterator[dict]:
    """The row's time relative to each of the others named, where it was measured."""
    for other, limit in limits.items():
        if row is not None and row[f"ratio_to_{other}"] is not None:
            yield bar(f"{claim} / {other}", row[f"ratio_to_{other}"], limit)


def gpu_bars(rows: Sequence[dict], setting: Setting) -> Iterator[dict]:
    """What the kernels are for: bfloat16 (with ``quick`` on a CPU what is usual there) with the paper's dropout."""
    E, r = POOLS[0]
    case = replace(setting.shape(setting.square), dtype=setting.usual, E=E, r=r, dropout=PAPER_DROPOUT)
    row = find(rows, "layer", case, "mixlora", TRAINING)
    yield from ratio_bars(row, f"layer, {case.name}, {TRAINING}: time", base=1.12, peft_lora=0.85)
    yield from stage_bars(rows)
    yield from training_bars(rows)
    step = step_case(setting, setting.usual, DECODE.B, E, r)
    ours, frozen = (find(rows, "decode", step, name, "forward") for name in ("mixlora", "base"))
    if ours is not None and frozen is not None:
        pairs = zip(ours["rounds_ms"], frozen["rounds_ms"])
        microseconds = median(1e3 * (a - b) for a, b in pairs if a is not None and b is not None)
        yield bar(f"decode, {step.name}: the adapter's time, µs", microseconds, 6.0, "{:.2f}")


def stage_bars(rows: Sequence[dict]) -> Iterator[dict]:
    """Of each shape the stage that makes least of the device's bandwidth; not of those whose times mean nothing."""
    stages = [row for row in rows if row["suite"] == "stages" and row["implementation"] == "mixlora"]
    stages = [row for row in stages if row["share_of_copy"] is not None and not row["note"]]
    for case in dict.fromkeys(row["case"] for row in stages):
        worst = min((row for row in stages if row["case"] == case), key=lambda row: row["share_of_copy"])
        claim = f"stages, {case}: least share of a copy's bandwidth ({worst['pass']})"
        yield bar(claim, worst["share_of_copy"], 0.8, "{:.1%}", at_least=True)


def training_bars(rows: Sequence[dict]) -> Iterator[dict]:
    """A whole model's training step: time and peak memory relative to ``peft_lora``."""
    steps = [row for row in rows if row["suite"] == "training" and row["pass"] == "training step"]
    by_case = {(row["case"], row["implementation"]): row for row in steps}
    for case in dict.fromkeys(row["case"] for row in steps):
        ours, lora = (by_case.get((case, name)) for name in ("mixlora", "peft_lora"))
        if ours is not None and lora is not None:
            yield from ratio_bars(ours, f"training, {case}: time", peft_lora=0.9)
            yield bar(f"training, {case}: peak / peft_lora", ours["peak_bytes"] / lora["peak_bytes"], 1.0)


def layer_bars(rows: Sequence[dict], setting: Setting) -> Iterator[dict]:
    """Time of ``mixlora`` relative to others on a CPU."""
    square, small, step = (setting.shape(case) for case in (setting.square, SMALL, DECODE))
    wanted = [("layer", replace(square, dtype=torch.float32), TRAINING, {"base": 1.15})]
    for dtype in BOTH:
        case = replace(square, dtype=dtype)
        wanted.append(("layer", case, TRAINING, {"peft_lora": 0.95, "published": 0.35}))
        wanted.append(("layer", replace(case, dropout=PAPER_DROPOUT), TRAINING, {"peft_lora": 0.95}))
    wanted += [("layer", small, TRAINING, {"peft_lora": 0.9}), ("decode", step, "forward", {"peft_lora": 1.05})]
    for suite, case, which, limits in wanted:
        yield from ratio_bars(
            find(rows, suite, case, "mixlora", which), f"{suite}, {case.name}, {which}: time", **limits
        )


def decoder_bars(rows: Sequence[dict]) -> Iterator[dict]:
    """Time of a whole decoder relative to the frozen one and to LoRA's, for the paper's form and for tied pairs."""
    limits = dict(zip((case.hidden for case in DECODERS), ((1.06, 0.88), (1.015, 0.95))))
    for row in rows:
        ours = row["suite"] == "decoder" and row["implementation"] in ("mixlora", "mixlora_tied")
        if ours and row["pass"] == TRAINING and row["dtype"] == "float32":
            base, lora = limits.get(row["hidden"], (1.06, 0.88))
            yield from ratio_bars(row, f"{row['case']}, {TRAINING}: {row['implementation']}", base=base, peft_lora=lora)


def scaling_bars(rows: Sequence[dict], setting: Setting) -> Iterator[dict]:
    """How the cost of ``mixlora`` grows with tokens and with E."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        lengths = [row["L"] for row in rows if row["suite"] == "scaling" and row["B"] == setting.square.B]
        full = replace(setting.shape(setting.square), L=max(lengths, default=1), dtype=dtype)
        few = replace(full, L=full.L // 4)

        def times(case: Shaped, name: str = "mixlora") -> list[float]:
            row = find(rows, "scaling", case, name, TRAINING)
            return row["rounds_ms"] if row else []

        if not times(full):
            continue
        per_token = paired_ratio(times(full), times(few)) * few.L / full.L
        few_factors, many = times(replace(full, E=8)), times(replace(full, E=32))
        growth = median((b - a) / a for a, b in zip(few_factors, many))
        tokens = f"{full.B * full.L} tokens / at {few.B * few.L}"
        yield bar(f"scaling, {dtype_name(dtype)}: time per token at {tokens}", per_token, 1.1)
        yield bar(f"scaling, {dtype_name(dtype)}: growth of the time from E = 8 to E = 32", growth, 0.05, "{:.1%}")


def memory_bars(rows: Sequence[dict]) -> Iterator[dict]:
    """Peak memory of ``mixlora`` relative to ``peft_lora``, case by case."""
    rows = [row for row in rows if row["suite"] == "memory" and row["pass"] == TRAINING]
    peaks = {(row["case"], row["implementation"]): row["peak_bytes"] for row in rows}
    for case in dict.fromkeys(row["case"] for row in rows):
        ours, lora = (peaks.get((case, name)) for name in ("mixlora", "peft_lora"))
        if ours and lora:
            yield bar(f"memory, {case}, {TRAINING}: peak / peft_lora", ours / lora, 1.0)


def error_bars(rows: Sequence[dict]) -> Iterator[dict]:
    """A layer's agreement with the float64 reference: a fixed bar in float32, eager's own error below it."""
    layers = [row for row in rows if row["suite"] not in ("model", "training", "decoder") and row["error"] is not None]
    ours = [row for row in layers if row["implementation"] == "mixlora"]
    exact = [row["error"] for row in ours if row["dtype"] == "float32"]
    if exact:
        yield bar("float32: largest error of mixlora", max(exact), 1e-5, "{:.1e}")
    for dtype in ("bfloat16", "float16"):
        pairs = [
            (row["error"], other["error"])
            for row in ours
            for other in layers
            if other["implementation"] == "eager" and row["dtype"] == dtype
            and all(other[key] == row[key] for key in ("suite", "case", "pass", "dtype"))
        ]  # fmt: skip
        if pairs:
            yield bar(f"{dtype}: error of mixlora / that of eager, largest", max(a / b for a, b in pairs), 1.5)
