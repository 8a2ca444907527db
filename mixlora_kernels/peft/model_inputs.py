"""ModelInputs: the arguments of a whole model's forward that routing depends on."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class ModelInputs:
    """The arguments of a whole model's forward that routing depends on.

    Args:
        labels: [B, L], the tokens to predict. Labels of other shapes, such as a classifier's, are ignored.
        logits_to_keep: the number of last tokens whose logits are computed.
        task, task_mask: a task embedding and its mask.
        repeats_task: whether the embedding is repeated for beams and returned sequences.
        generates: whether the model can generate. Only then are labels tokens.
        media_ids: the result of ``media.media_ids`` for the model.
        input_ids: [B, L], the ids of the tokens, if the model got them.
        items: the number of labelled tokens of a whole optimiser step, by which the loss is divided, if it is known.
        continues: whether the forward continues the tokens of the one before it without a cache; see ``grows``.
    """

    def __init__(
        self, labels: Tensor | None = None, logits_to_keep: Any = None, task: Tensor | None = None,
        task_mask: Tensor | None = None, generates: bool = True, media_ids: tuple[int, ...] | str = (),
        input_ids: Tensor | None = None, items: Any = None, continues: bool = False, repeats_task: bool = True,
    ):  # fmt: skip
        self.has_labels, self.continues = labels is not None, continues
        self.labels = labels if generates and labels is not None and labels.dim() == 2 else None
        self.logits_to_keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        self.task, self.task_mask, self.repeats_task, self.generates = task, task_mask, repeats_task, generates
        self.media_ids, self.input_ids, self.items = media_ids, input_ids, items


def by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """A forward's arguments by name. The signature is only read if there are positional arguments."""
    return dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs if args else kwargs


def uncached_ids(named: dict, training: bool) -> Tensor | None:
    """The ids [B, L] of a decoder's tokens, from a whole model's arguments by name, if the forward may be a step of
    ``generate(use_cache=False)``: it is told to make no cache, and gets no labels. None otherwise."""
    if training and torch.is_grad_enabled():
        return None
    if named.get("use_cache") is not False or named.get("labels") is not None:
        return None
    if torch.compiler.is_compiling():  # a compiled graph cannot compare values
        return None
    ids = named.get("decoder_input_ids")
    ids = named.get("input_ids") if ids is None else ids
    return ids.detach() if isinstance(ids, Tensor) and ids.dim() == 2 else None


def grows(ids: Tensor | None, before: Tensor | None) -> bool:
    """Whether ids [B, L] are those of the forward before, [B, L - 1], and one more in each row."""
    if ids is None or before is None or before.shape != (ids.shape[0], ids.shape[1] - 1):
        return False
    return before.device == ids.device and torch.equal(ids[:, :-1], before)
