"""Tune a LLaVA with MixLoRA or LoRA.

    python -m mixlora_llava.training.train --config FILE [--method METHOD] [--dry-run] [--strict] [--fresh]

A run that was stopped, however rudely, goes on from its last whole checkpoint and ends with the same weights.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..data.dataset import Collator, Conversations, Encoder
from ..model.load import TASKS, empty_llava, load_llava, load_processor
from ..model.patch import Patched, patch_llava
from ..model.task_embeddings import embed_tasks, read_definitions
from . import estimate
from .settings import Settings

logger = logging.getLogger(__name__)
SETTINGS = "settings.json"
BAD_RECORDS = "bad_records.json"
LATER = {"strict", "device_tflops"}  # may differ where a run goes on: they do not bear on the result


class LengthGrouped(Sampler):
    """Records of similar lengths together, in an order that depends on the seed and the epoch alone.

    transformers' own sampler draws its order from the global generator, which after a restart is not where it was at
    the beginning of the epoch. It also goes through fifty batches from the longest to the shortest, and so, where
    lengths differ by task, through one task after another; here the batches are shuffled. The longest comes first, so
    that memory runs out early if at all.

    Args:
        lengths: of all records, in tokens.
        batch_size: records of one optimizer step on all devices.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        indices = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        whole = len(indices) // self.batch_size  # a smaller last batch stays the last
        order = [0, *(1 + torch.randperm(max(whole - 1, 0), generator=generator)).tolist(), *range(whole, len(batches))]
        for number in order[: len(batches)]:
            yield from batches[number]


class LlavaTrainer(Trainer):
    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGrouped(dataset.lengths, together, self.args.seed)


def train(settings: Settings, fresh: bool = False, callbacks: Sequence[TrainerCallback] = ()) -> dict:
    """Run a training to its end, from the last whole checkpoint where there is one.

    Args:
        fresh: refuse to go on instead.
        callbacks: the Trainer's.

    Returns:
        ``loss`` by step, ``bad_records`` by reason, and ``steps``.

    Raises:
        ValueError: the output folder holds a run with other settings; or see ``data`` and ``patch``.
    """
    output = Path(settings.output)
    resume = last_checkpoint(output)
    if resume and fresh:
        raise ValueError(f"{output} holds a run already; without --fresh it goes on")
    remember(settings, output, resume is not None)
    arguments = training_arguments(settings)
    set_seed(arguments.seed)
    model, processor = load_llava(settings.model, settings.dtype)
    dataset = read_data(settings, processor)
    embeddings = None
    if settings.routing == "task":
        definitions = read_definitions(settings.task_definitions, list(dataset.task_ids))
        embeddings = embed_tasks(model, processor.tokenizer, definitions)
    set_seed(arguments.seed)  # the adapter's initial values must not depend on how the model was loaded
    patched = patch(model, settings)
    table = None if embeddings is None else torch.stack([embeddings[task] for task in dataset.task_ids])
    blank = dataset.encoder.blank() if settings.train_projector and arguments.world_size > 1 else None
    collator = Collator(processor.tokenizer.pad_token_id, table, blank)
    trainer = LlavaTrainer(
        model=patched.model, args=arguments, train_dataset=dataset, data_collator=collator, callbacks=list(callbacks)
    )
    if trainer.is_world_process_zero():
        announce(patched, dataset, settings, trainer, collator)
        write_problems(dataset, output)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        write_problems(dataset, output)  # again: images may have gone bad since
        if embeddings is not None:
            save_file(embeddings, output / TASKS)
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    return {"loss": losses, "bad_records": dataset.problems, "steps": trainer.state.global_step}


def dry_run(settings: Settings) -> str:
    """What ``train`` would do, without weights: the patched modules, the parameters, memory and time.

    The records are read and checked where their file exists; else their number is unknown, and the estimate is for one
    of ``max_length`` tokens of text and an image.
    """
    model = empty_llava(settings.model, settings.dtype)
    patched = patch(model, settings, low_memory=True)
    vision = model.config.vision_config
    longest = settings.max_length - 1 + (vision.image_size // vision.patch_size) ** 2
    lengths, note = [longest], f"{settings.data} does not exist: one record of {longest} tokens is assumed\n"
    if Path(settings.data).is_file():
        lengths, note = read_data(settings, load_processor(settings.model)).lengths, ""
    needs, total, flops = plan(patched, lengths, settings, devices=1)
    modules = "\n".join(patched.modules)
    return f"{modules}\n{note}{estimate.describe(patched.report(), needs, total, flops, settings.device_tflops)}"


def plan(patched: Patched, lengths: list[int], settings: Settings, devices: int) -> tuple[dict, int, float]:
    """Memory, optimizer steps and operations of a run."""
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
    """Print what the run will need; the time by running a batch of middling length."""
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


def patch(model, settings: Settings, low_memory: bool = False) -> Patched:
    config = settings.adapter(task_dim=model.config.get_text_config().hidden_size)
    if low_memory:
        with torch.device("meta"):
            return patch_llava(model, config, train_projector=settings.train_projector)
    return patch_llava(model, config, train_projector=settings.train_projector)


def read_data(settings: Settings, processor) -> Conversations:
    encoder = Encoder(processor, settings.template, settings.max_length)
    decode = settings.check_images == "decode"
    return Conversations.read(
        settings.data, settings.images, encoder, strict=settings.strict, decode=decode, limit=settings.limit
    )


def write_problems(dataset: Conversations, output: Path) -> None:
    """Leave the ids of the records that were left out, by reason, in the output folder."""
    (output / BAD_RECORDS).write_text(json.dumps(dataset.problems, indent=1), encoding="utf-8")


def training_arguments(settings: Settings) -> TrainingArguments:
    # The collator makes its batch of more than the model's arguments; unknown columns must reach it.
    fixed = {"output_dir": settings.output, "remove_unused_columns": False, "label_names": ["labels"]}
    # Every parameter that is trained has a gradient in every step; see ``Collator``.
    defaults = {"report_to": "none", "ddp_find_unused_parameters": False}
    return TrainingArguments(**(defaults | settings.training | fixed))


def last_checkpoint(output: Path) -> Path | None:
    """The last checkpoint that was written to its end; the Trainer writes its state last."""
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning("%s was not written to its end, and is not used", path)
    return None


def remember(settings: Settings, output: Path, resumes: bool) -> None:
    """Keep the settings beside the checkpoints, and compare them where a run goes on."""
    file = output / SETTINGS
    now = settings.model_dump(mode="json")
    if resumes and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in now if now[name] != before.get(name) and name not in LATER]
        if changed:
            differences = "; ".join(f"{name}: {before.get(name)!r}, now {now[name]!r}" for name in changed)
            raise ValueError(f"{output} holds a run with other settings ({differences})")
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=2), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--method", help="instead of the file's")
    parser.add_argument("--output", help="instead of the file's")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--strict", action="store_true", default=None, help="stop at bad records")
    parser.add_argument("--fresh", action="store_true", help="refuse to go on with a run that is there")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    try:
        settings = Settings.read(options.config, method=options.method, output=options.output, strict=options.strict)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.dry_run:
        print(dry_run(settings))
        return
    report = train(settings, options.fresh)
    print(f"{report['steps']} steps; adapter and settings in {settings.output}")


if __name__ == "__main__":
    main()
