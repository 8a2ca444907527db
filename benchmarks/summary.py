"""The claims that the benchmark answers, each read off the rows."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

import torch
from measure import paired_ratio
from problem import Case, dtype_name
from suites import BOTH, DECODE, PAPER_DROPOUT, SMALL, SQUARE, Setting

TRAINING = "forward+backward"


def summarise(rows: Sequence[dict], setting: Setting) -> list[dict]:
    """The bars that the rows can answer: claim, measured, bar, met (None with ``quick``, where shapes are too small
    for the claim to mean anything)."""
    bars = [*layer_bars(rows, setting), *scaling_bars(rows, setting), *memory_bars(rows), *error_bars(rows)]
    for bar in bars:
        bar["met"] = None if setting.quick else bool(bar["measured"] <= bar["bar"])
        form = bar.pop("form")
        bar["measured_text"], bar["bar_text"] = form.format(bar["measured"]), "≤ " + form.format(bar["bar"])
    return bars


def bar(claim: str, measured: float, limit: float, form: str = "{:.3f}") -> dict:
    return {"claim": claim, "measured": measured, "bar": limit, "form": form}


def find(rows: Sequence[dict], suite: str, case: Case, implementation: str, which: str) -> dict | None:
    wanted = {"suite": suite, "implementation": implementation, "pass": which} | case.fields
    del wanted["case"]  # its label may differ
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def layer_bars(rows: Sequence[dict], setting: Setting) -> Iterator[dict]:
    """Time of ``mixlora`` relative to others."""
    square, small, step = setting.shape(SQUARE), setting.shape(SMALL), setting.shape(DECODE)
    wanted = [("layer", replace(square, dtype=torch.float32), TRAINING, "base", 1.15)]
    for dtype in BOTH:
        case = replace(square, dtype=dtype)
        wanted += [("layer", case, TRAINING, "peft_lora", 0.95), ("layer", case, TRAINING, "published", 0.35)]
        wanted.append(("layer", replace(case, dropout=PAPER_DROPOUT), TRAINING, "peft_lora", 0.95))
    wanted.append(("layer", small, TRAINING, "peft_lora", 0.9))
    wanted.append(("decode", step, "forward", "peft_lora", 1.05))
    for suite, case, which, other, limit in wanted:
        row = find(rows, suite, case, "mixlora", which)
        if row is not None and row[f"ratio_to_{other}"] is not None:
            yield bar(f"{suite}, {case.name}, {which}: time / {other}", row[f"ratio_to_{other}"], limit)


def scaling_bars(rows: Sequence[dict], setting: Setting) -> Iterator[dict]:
    """How the cost of ``mixlora`` grows with tokens and with E."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        lengths = [row["L"] for row in rows if row["suite"] == "scaling" and row["B"] == SQUARE.B]
        full = replace(setting.shape(SQUARE), L=max(lengths, default=1), dtype=dtype)
        few = replace(full, L=full.L // 4)

        def times(case: Case, name: str = "mixlora") -> list[float]:
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
    peaks = {
        (row["case"], row["implementation"]): row["peak_bytes"]
        for row in rows
        if row["suite"] == "memory" and row["pass"] == TRAINING
    }
    for case in dict.fromkeys(case for case, _ in peaks):
        ratio = peaks[case, "mixlora"] / peaks[case, "peft_lora"]
        yield bar(f"memory, {case}, {TRAINING}: peak / peft_lora", ratio, 1.0)


def error_bars(rows: Sequence[dict]) -> Iterator[dict]:
    """A layer's agreement with the float64 reference: a fixed bar in float32, eager's own error below it."""
    ours = [row for row in rows if row["implementation"] == "mixlora" and row["suite"] != "model"]
    exact = [row["error"] for row in ours if row["dtype"] == "float32"]
    if exact:
        yield bar("float32: largest error of mixlora", max(exact), 1e-5, "{:.1e}")
    for dtype in ("bfloat16", "float16"):
        pairs = [
            (row["error"], other["error"])
            for row in ours
            for other in rows
            if other["implementation"] == "eager" and row["dtype"] == dtype
            and all(other[key] == row[key] for key in ("suite", "case", "pass", "dtype"))
        ]  # fmt: skip
        if pairs:
            yield bar(f"{dtype}: error of mixlora / that of eager, largest", max(a / b for a, b in pairs), 1.5)
