"""Tune a LLaVA with MixLoRA or LoRA.

A run that was stopped or killed resumes from its last complete checkpoint, and ends with the same weights. A run that
is finished is not trained further.
"""

import json
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
from .checkpoints import last_checkpoint
from .files import check_files
from .plan import announce
from .prepare import patch, read_data
from .remembered import remember
from .settings import Settings

BAD_RECORDS = "bad_records.json"


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

    If that checkpoint is the run's end, no model is loaded. The checkpoint's adapter is copied to the output folder,
    because the run may have been killed before it was saved there.

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
    arguments = training_arguments(settings)
    remember(settings, output, resume is not None)
    if resume and resume.is_final:
        if arguments.should_save:
            print(f"the run is finished: {resume.folder} is its end, and there is nothing left to train")
            resume.place_adapter(output)
        return summary(resume.state["log_history"], resume.state["global_step"], read_problems(output))
    set_seed(arguments.seed)
    model, processor = load_llava(settings.model, settings.dtype)
    dataset = read_data(settings, processor)
    embeddings = None
    if settings.routing == "task":
        dataset.check_tasks()
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
        if embeddings is not None:  # before the training, so that a finished run lacks nothing but the adapter
            save_file(embeddings, output / TASKS)
    trainer.train(resume_from_checkpoint=str(resume.folder) if resume else None)
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        write_problems(dataset, output)  # again, because images may have become unreadable since
    return summary(trainer.state.log_history, trainer.state.global_step, dataset.problems)


def summary(history: list[dict], steps: int, problems: dict) -> dict:
    """The result of ``train``, from the Trainer's history."""
    return {
        "loss": {row["step"]: row["loss"] for row in history if "loss" in row},
        "bad_records": problems,
        "steps": steps,
    }


def write_problems(dataset: Conversations, output: Path) -> None:
    """Write the ids of the records that were left out, by reason, to the output folder."""
    (output / BAD_RECORDS).write_text(json.dumps(dataset.problems, indent=1), encoding="utf-8")


def read_problems(output: Path) -> dict:
    """What ``write_problems`` wrote."""
    file = output / BAD_RECORDS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def training_arguments(settings: Settings) -> TrainingArguments:
    """transformers' arguments of a run.

    Raises:
        ValueError: transformers refuses the values in ``training``.
    """
    # The collator makes its batch of more than the model's arguments; unknown columns must reach it.
    fixed = {"output_dir": settings.output, "remove_unused_columns": False, "label_names": ["labels"]}
    # Every parameter that is trained has a gradient in every step; see ``Collator``.
    defaults = {"report_to": "none", "ddp_find_unused_parameters": False}
    try:
        return TrainingArguments(**(defaults | settings.training | fixed))
    except ValueError as error:
        raise Refusal(f"training: {error}") from error
