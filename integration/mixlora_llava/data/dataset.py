"""A data set from LLaVA's JSON file and image folder. Records are checked first, and images are read when needed."""

import logging
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..refusal import Refusal
from .conversation import IMAGE, TEMPLATES, BadRecord, Turn, render
from .images import BadImage, load_image
from .records import Record, name_of, read_entries, read_record

IGNORED = -100
NAMED = 20  # the most ids that a message lists for each reason; ``Conversations.problems`` has all
IN_A_ROW = 100  # consecutive records with unreadable images that stop a training
logger = logging.getLogger(__name__)


class Encoder:
    """Encodes records for the training.

    Args:
        processor: transformers' processor of the model. Its tokenizer must be a fast one, which tells the position of
            each token in the text.
        template: the name of the conversation template.
        max_length: the longest text in tokens, with the image counted as one. Longer conversations are cut.
    """

    def __init__(self, processor, template: str = "v1", max_length: int = 1792):
        self.processor, self.tokenizer = processor, processor.tokenizer
        if not self.tokenizer.is_fast:
            raise Refusal(
                f"{type(self.tokenizer).__name__} does not tell the positions of its tokens: use a fast tokenizer"
            )
        if template not in TEMPLATES:
            raise Refusal(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
        self.template, self.max_length = TEMPLATES[template], max_length
        self.image_id = self.tokenizer.convert_tokens_to_ids(IMAGE)
        self.varies = hasattr(processor.image_processor, "image_grid_pinpoints")  # LLaVA-Next: tokens by image size
        self._image_tokens: dict[tuple[int, int], int] = {}

    def text(self, turns: list[Turn]) -> tuple[list[int], list[int]]:
        """The token ids and labels of a conversation, with the image as one token. Labels outside answers are -100.

        Raises:
            BadRecord: the first ``max_length`` tokens contain no answer, or not the image.
        """
        text, spans = render(turns, self.template, self.tokenizer.eos_token)
        encoded = self.tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=self.max_length)
        ids, labels = encoded["input_ids"], [IGNORED] * len(encoded["input_ids"])
        place = 0
        for position, (start, end) in enumerate(encoded["offset_mapping"]):
            while place < len(spans) and spans[place][1] <= start:
                place += 1
            # A token that begins with the space before the answer belongs to the answer.
            if place < len(spans) and end > max(start, spans[place][0]):
                labels[position] = ids[position]
        if all(label == IGNORED for label in labels):
            raise BadRecord(f"no answer left after {self.max_length} tokens")
        asked = sum(question.count(IMAGE) for question, _ in turns)
        if ids.count(self.image_id) < asked:
            raise BadRecord(f"no image left after {self.max_length} tokens")
        if ids.count(self.image_id) > asked:
            raise BadRecord("a text that the tokenizer takes for an image")
        return ids, labels

    def length(self, record: Record, size: tuple[int, int] | None) -> int:
        """The number of tokens of a record, from its image's width and height.

        Raises:
            BadRecord: as ``text``.
        """
        length = len(self.text(record.turns)[0])
        if size is None:
            return length
        size = size if self.varies else (32, 32)
        if size not in self._image_tokens:
            self._image_tokens[size] = self._image(Image.new("RGB", size))[0]
        return length - 1 + self._image_tokens[size]

    def _image(self, image: Image.Image) -> tuple[int, dict]:
        out = self.processor(text=IMAGE, images=image, return_tensors="pt")
        count = int((out["input_ids"] == self.image_id).sum())
        return count, {key: out[key] for key in ("pixel_values", "image_sizes") if key in out}

    def blank(self) -> dict:
        """A blank image: its tensors, and its tokens as ``input_ids``."""
        count, item = self._image(Image.new("RGB", (32, 32)))
        return item | {"input_ids": torch.full((count,), self.image_id)}

    def __call__(self, record: Record) -> dict:
        """``input_ids`` and ``labels`` [L] int64, ``attention_mask``, and the image's tensors."""
        ids, labels = self.text(record.turns)
        item = {}
        if record.image is not None:
            count, item = self._image(load_image(record.image))
            at = ids.index(self.image_id)
            ids = ids[:at] + [self.image_id] * count + ids[at + 1 :]
            labels = labels[:at] + [IGNORED] * count + labels[at + 1 :]
        return item | {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


class Conversations(Dataset):
    """The usable records of a file.

    If an image becomes unreadable during the training, the next usable record replaces its record, and the run goes on.
    The record's id is logged, and added to ``problems`` in the process that read it.

    Attributes:
        records, lengths: the usable records, and their numbers of tokens.
        problems: the ids of the other records, by reason.
    """

    def __init__(
        self,
        records: list[Record],
        lengths: list[int],
        encoder: Encoder,
        problems: dict[str, list[str]],
        strict: bool = False,
    ):
        self.records, self.lengths, self.encoder, self.strict = records, lengths, encoder, strict
        self.problems = problems
        tasks = sorted({record.task for record in records if record.task is not None})
        self.task_ids = {task: number for number, task in enumerate(tasks)}

    @classmethod
    def read(
        cls,
        file: str | Path,
        images: str | Path,
        encoder: Encoder,
        *,
        strict: bool = False,
        decode: bool = True,
        limit: int | None = None,
    ):
        """Read and check a file of records, ``[{id, image, task_name, conversations}, ...]``.

        Args:
            images: the folder of the records' images.
            strict: whether a bad record is an error.
            decode: whether to read the pixels of each image now. Otherwise only its header is read, and a truncated
                image is found in the training.
            limit: the most records to read.

        Raises:
            ValueError: the file is not a list of records; no record is usable; or ``strict``, and a record is bad.
        """
        entries = read_entries(file, limit)

        def look(numbered: tuple[int, object]):
            try:
                return read_record(*numbered, images, decode)
            except (BadRecord, BadImage) as error:
                return name_of(*numbered), error

        records, lengths, problems = [], [], defaultdict(list)
        with ThreadPoolExecutor() as pool:  # decoding releases the interpreter's lock
            for record, found in pool.map(look, enumerate(entries), chunksize=64):
                if not isinstance(found, Exception):
                    try:
                        lengths.append(encoder.length(record, found))
                        records.append(record)
                        continue
                    except BadRecord as error:
                        record, found = record.id, error
                problems[_why(found)].append(record)
        if problems:
            message = f"{file}: {len(entries) - len(records)} of {len(entries)} records cannot be used. "
            message += describe_problems(problems)
            if strict:
                raise Refusal(message)
            logger.warning(message)
        if not records:
            raise Refusal(f"{file} has no record that can be used")
        if again := [name for name, count in Counter(record.id for record in records).items() if count > 1]:
            logger.warning("%s: %d ids name several records, all of which are used: %s", file, len(again), _some(again))
        return cls(records, lengths, encoder, dict(problems), strict)

    def check_tasks(self) -> None:
        """Raise a ValueError unless each record names its task, which ``routing="task"`` needs."""
        if lacking := [record.id for record in self.records if record.task is None]:
            raise Refusal(f"routing by task needs a task_name in each record, these have none: {_some(lacking)}")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        """The item of a record, or of the next usable one if the record's image is unreadable.

        Raises:
            ValueError: the image is unreadable, and ``strict``; or the images of ``IN_A_ROW`` records are.
        """
        for step in range(min(IN_A_ROW, len(self))):
            record = self.records[(index + step) % len(self)]
            try:
                return self.encoder(record) | {"task": self.task_ids.get(record.task, -1)}
            except BadImage as error:
                if self.strict:
                    raise Refusal(f"record {record.id}: {error}") from error
                known = self.problems.setdefault(error.why, [])
                if record.id not in known:
                    known.append(record.id)
                    logger.warning("record %s is left out, the next one takes its place: %s", record.id, error)
                last = error
        raise Refusal(
            f"record {record.id} and {step} before it cannot be used ({last}): is the image folder still there?"
        )


def describe_problems(problems: dict[str, list[str]]) -> str:
    """For each reason, the number of records that were left out and the first ``NAMED`` ids, as text."""
    return "; ".join(f"{reason}: {len(names)} ({_some(names)})" for reason, names in problems.items())


def _some(names: list[str]) -> str:
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _why(error: Exception) -> str:
    return error.why if isinstance(error, BadImage) else str(error)


class Collator:
    """Makes a batch of items, padded on the right.

    Args:
        pad_id: the padding token.
        task_embeddings: [tasks, d_task], for ``routing="task"``. Each row of the batch gets its task's embedding.
        blank: the result of ``Encoder.blank``. If several processes train the projector, each must run it in each step;
            otherwise they wait for each other's gradients for ever. A batch without images therefore gets the blank
            image in the padding of its first row, to which no token attends. The projector's gradient is then zero, and
            no other gradient changes.
    """

    def __init__(self, pad_id: int, task_embeddings: Tensor | None = None, blank: dict | None = None):
        self.pad_id, self.task_embeddings, self.blank = pad_id, task_embeddings, blank

    def __call__(self, items: list[dict]) -> dict[str, Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids, labels = ([item[name] for item in items] for name in ("input_ids", "labels"))
        lengths = torch.tensor([len(row) for row in ids])
        images = [item for item in items if "pixel_values" in item]
        if self.blank is not None and not images:
            images, hidden = [self.blank], self.blank["input_ids"]
            ids[0] = torch.cat((ids[0], hidden))
            labels[0] = torch.cat((labels[0], torch.full_like(hidden, IGNORED)))
        ids = pad(ids, batch_first=True, padding_value=self.pad_id)
        labels = pad(labels, batch_first=True, padding_value=IGNORED)
        batch = {"input_ids": ids, "labels": labels}
        batch["attention_mask"] = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
        batch |= stack_images(images)
        if self.task_embeddings is not None:
            batch["task_embedding"] = self.task_embeddings[torch.tensor([item["task"] for item in items])]
        return batch


def stack_images(items: list[dict]) -> dict[str, Tensor]:
    """The image tensors of several items: [images, 3, H, W], or [images, most patches, 3, H, W] for LLaVA-Next."""
    if not items:
        return {}
    pixels = [item["pixel_values"] for item in items]
    if pixels[0].dim() == 5:
        most = max(p.shape[1] for p in pixels)
        pixels = [torch.cat((p, p.new_zeros(1, most - p.shape[1], *p.shape[2:])), dim=1) for p in pixels]
    batch = {"pixel_values": torch.cat(pixels)}
    if "image_sizes" in items[0]:
        batch["image_sizes"] = torch.cat([item["image_sizes"] for item in items])
    return batch
