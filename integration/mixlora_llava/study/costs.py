"""Measure the cost of a training step: processor time and peak memory."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch


def median_ms(seconds: list[float]) -> float:
    """The median of the steps' times in ms, without the first tenth of the steps, which includes first-time costs."""
    return 1e3 * median(seconds[len(seconds) // 10 :])


def peak_bytes(run: Callable[[], object]) -> int:
    """The peak memory of ``run()`` beyond the memory held before it, in bytes, from torch's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak
