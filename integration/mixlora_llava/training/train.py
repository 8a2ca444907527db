"""Tune a LLaVA with MixLoRA or LoRA.

A run that was stopped or killed resumes from its last complete checkpoint, and ends with the same weights.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..data.dataset import Collator, Conversations
from ..model.load import TASKS, load_llava
from ..model.task_embeddings import embed_tasks, read_definitions
from ..refusal import Refusal
from .files import check_files
from .plan import announce
from .prepare import patch, read_data
from .settings import Settings

logger = logging.getLogger(__name__)
SETTINGS = "settings.json"
BAD_RECORDS = "bad_records.json"
LATER = {"strict", "device_tflops"}  # these may change when a run resumes, because they do not change its result


class LengthGrouped(Sampler):
    """Sample batches of records of similar lengths, in an order that depends on the seed and the epoch alone.

    transformers' own sampler takes its order from the global generator, whose state at the beginning of the epoch is
    lost in a restart. It also sorts groups of fifty batches by length, so that tasks of different lengths are trained
    one after the other. This sampler shuffles the batches. The batch with the longest records comes first, so that a
    lack of memory shows early.

    Args:
        lengths: the length of each record, in tokens.
        batch_size: the number of records of one optimizer step on all devices.
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
        whole = len(indices) // self.batch_size  # a smaller last batch stays last
        order = [0, *(1 + torch.randperm(max(whole - 1, 0), generator=generator)).tolist(), *range(whole, len(batches))]
        for number in order[: len(batches)]:
            yield from batches[number]


class LlavaTrainer(Trainer):
    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGrouped(dataset.lengths, together, self.args.seed)


def train(settings: Settings, fresh: bool = False, callbacks: Sequence[TrainerCallback] = ()) -> dict:
    """Run a training to its end, from the last complete checkpoint if there is one.

    Args:
        fresh: raise an error instead of resuming.
        callbacks: callbacks for the Trainer.

    Returns:
        ``loss`` by step, ``bad_records`` by reason, and ``steps``.

    Raises:
        ValueError: the output folder holds a run with other settings; a file of the settings is missing; or see
            ``data`` and ``patch``.
    """
    output = Path(settings.output)
    resume = last_checkpoint(output)
    if resume and fresh:
        raise Refusal(f"{output} already holds a run: leave out --fresh to resume it")
    check_files(settings)
    remember(settings, output, resume is not None)
    arguments = training_arguments(settings)
    set_seed(arguments.seed)
    model, processor = load_llava(settings.model, settings.dtype)
    dataset = read_data(settings, processor)
    embeddings = None
    if settings.routing == "task":
        definitions = read_definitions(settings.task_definitions, list(dataset.task_ids))
        embeddings = embed_tasks(model, processor.tokenizer, definitions)
    set_seed(arguments.seed)  # so that the adapter's initial values do not depend on how the model was loaded
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
        write_problems(dataset, output)  # again, because images may have become unreadable since
        if embeddings is not None:
            save_file(embeddings, output / TASKS)
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    return {"loss": losses, "bad_records": dataset.problems, "steps": trainer.state.global_step}


def write_problems(dataset: Conversations, output: Path) -> None:
    """Write the ids of the records that were left out, by reason, to the output folder."""
    (output / BAD_RECORDS).write_text(json.dumps(dataset.problems, indent=1), encoding="utf-8")


def training_arguments(settings: Settings) -> TrainingArguments:
    # The collator makes its batch of more than the model's arguments; unknown columns must reach it.
    fixed = {"output_dir": settings.output, "remove_unused_columns": False, "label_names": ["labels"]}
    # Every parameter that is trained has a gradient in every step; see ``Collator``.
    defaults = {"report_to": "none", "ddp_find_unused_parameters": False}
    return TrainingArguments(**(defaults | settings.training | fixed))


def last_checkpoint(output: Path) -> Path | None:
    """The last complete checkpoint. The Trainer writes a checkpoint's state file last."""
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning("%s was not written to its end, and is not used", path)
    return None


def remember(settings: Settings, output: Path, resumes: bool) -> None:
    """Write the settings beside the checkpoints; when a run resumes, compare them."""
    file = output / SETTINGS
    now = settings.model_dump(mode="json")
    if resumes and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in now if now[name] != before.get(name) and name not in LATER]
        if changed:
            differences = "; ".join(f"{name}: {before.get(name)!r}, now {now[name]!r}" for name in changed)
            raise Refusal(
                f"{output} holds a run with other settings ({differences}): give another output, or delete it"
            )
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=2), encoding="utf-8")
