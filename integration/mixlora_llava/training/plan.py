"""Describe what a run will do and need, before its first step."""

import torch
from transformers import Trainer

from ..data.dataset import Conversations
from ..model.load import empty_llava, load_processor
from ..model.patch import Patched
from . import estimate
from .files import missing_files, say_missing
from .prepare import patch, read_data
from .settings import Settings


def dry_run(settings: Settings) -> str:
    """Describe what ``train`` would do, without weights: the patched modules, the parameters, memory and time.

    If the records and their images exist, they are read and checked. Otherwise their number is unknown: the estimate is
    for one record with ``max_length`` tokens of text and an image, and the last line says what is missing.
    """
    model = empty_llava(settings.model, settings.dtype)
    patched = patch(model, settings, low_memory=True)
    parts = ["\n".join(patched.modules)]
    missing = missing_files(settings)
    if "data" in missing or "images" in missing:
        vision = model.config.vision_config
        longest = settings.max_length - 1 + (vision.image_size // vision.patch_size) ** 2
        lengths = [longest]
        parts.append(f"records: not there to be counted; one of {longest} tokens is assumed")
    else:
        lengths = read_data(settings, load_processor(settings.model)).lengths
    needs, total, flops = plan(patched, lengths, settings, devices=1)
    parts.append(estimate.describe(patched.report(), needs, total, flops, settings.device_tflops))
    return "\n".join(parts + ([say_missing(missing)] if missing else []))


def plan(patched: Patched, lengths: list[int], settings: Settings, devices: int) -> tuple[dict, int, float]:
    """The memory, the optimizer steps and the operations of a run."""
    given = settings.training
    batch = given.get("per_device_train_batch_size", 8)
    epochs, checkpointing = given.get("num_train_epochs", 3), given.get("gradient_checkpointing", False)
    size = 2 if given.get("bf16") or given.get("fp16") else next(patched.model.parameters()).element_size()
    needs = estimate.memory(patched.model, batch, max(lengths), checkpointing, size)
    total = estimate.steps(len(lengths), batch, given.get("gradient_accumulation_steps", 1), devices, epochs)
    if given.get("max_steps", -1) > 0:
        epochs, total = epochs * given["max_steps"] / total, given["max_steps"]
    return needs, total, estimate.operations(patched.model, lengths, checkpointing) * epochs


def announce(patched: Patched, dataset: Conversations, settings: Settings, trainer: Trainer, collator) -> None:
    """Print what the run will need. The time is measured on a batch of records of medium length."""
    needs, total, flops = plan(patched, dataset.lengths, settings, trainer.args.world_size)
    print(estimate.describe(patched.report(), needs, total, flops, settings.device_tflops))
    if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        print("time: not measured, because one process alone cannot run a model that several share")
        return
    batch = trainer.args.train_batch_size
    ordered = sorted(range(len(dataset)), key=dataset.lengths.__getitem__)
    start = max(0, (len(ordered) - batch) // 2)
    middle = [dataset[index] for index in ordered[start : start + batch]]
    autocast = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else None
    found = estimate.measure(patched.model, collator(middle), trainer.args.device, autocast)
    seconds = found["seconds"] * total * trainer.args.gradient_accumulation_steps
    peak = f", {estimate.size(found['peak_bytes'])} at the peak" if "peak_bytes" in found else ""
    print(
        f"time: about {seconds / 60:.1f} minutes, from {found['seconds']:.3f} s measured for a batch of {batch}{peak}"
    )
