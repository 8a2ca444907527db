"""Add the load-balancing loss of a model's adapters to the loss that the model computes."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..balance import balance_loss
from .model_inputs import ModelInputs
from .tokens import IGNORED

if TYPE_CHECKING:
    from .forward_pass import ForwardPass

WITHOUT_LOSS = (
    "balance has no effect in this training: the model got no labels and computed no loss that the load-balancing loss "
    "could be added to. Let the trainer pass labels to the model (label smoothing and loss functions of your own take "
    "them out), or set balance=0"
)
OTHER_LOSS = (
    "balance has no effect in this training: the trainer computes its loss from the log-probabilities that the model "
    "returns, as TRL's SFTTrainer does, and ignores the model's loss, which the load-balancing loss is added to. Use "
    "transformers' Trainer, or set balance=0"
)
WITHOUT_GRADIENT = (
    "balance has no effect in this training: the routers' probabilities have no gradient. Checkpoint activations with "
    "gradient_checkpointing_kwargs={'use_reentrant': False}, train the routers, or set balance=0"
)


def add_balance_loss(output: Any, passes: "Sequence[ForwardPass]", inputs: ModelInputs) -> Any:
    """Return a model's output with the load-balancing loss added to its loss, in training.

    It is added with the adapters' weight ``balance``, averaged over their layers. Where the model divides its loss by
    the tokens of several accumulated batches, this batch adds its part.
    """
    balanced = [forward_pass for forward_pass in passes if any(forward_pass.balances.values())]
    if not balanced or not torch.is_grad_enabled() or not any(forward_pass.training for forward_pass in balanced):
        return output
    loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    if not inputs.has_labels or not isinstance(loss, Tensor) or loss.dim():  # some models give (logits, loss)
        return _warn(WITHOUT_LOSS, output)
    added = _weighted_loss(balanced)
    if not added.requires_grad:
        return _warn(WITHOUT_GRADIENT, output)
    if getattr(output, "log_probs", None) is not None:
        return _warn(OTHER_LOSS, output)
    shifted = all(forward_pass.encoded is None for forward_pass in passes)  # labels of decoders behind encoders are not
    loss = loss + _part(inputs, shifted) * added.to(loss.device, loss.dtype)
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output.loss = loss
    return output


def _weighted_loss(passes: "Sequence[ForwardPass]") -> Tensor:
    """Σ over adapters: the weight, times the mean over layers of ``balance_loss``."""
    total: list[Tensor] = []
    for name in dict.fromkeys(name for forward_pass in passes for name in forward_pass.balances):
        losses, count, weight = [], 0, 0.0
        for forward_pass in passes:
            weight = forward_pass.balances.get(name, weight)
            groups = {id(r.routing): r.routing for (_, own), r in forward_pass.routings.items() if own == name}
            for routing in groups.values():
                losses.append(len(routing.index_a) * balance_loss(routing))
                count += len(routing.index_a)
        if weight and losses:
            first = losses[0].device  # of a model on several devices
            total.append(weight / count * torch.stack([loss.to(first) for loss in losses]).sum())
    return torch.stack([loss.to(total[0].device) for loss in total]).sum()


def _part(inputs: ModelInputs, shifted: bool) -> Any:
    """This batch's part of the optimiser step's labelled tokens; 1 if the model averages over this batch. ``shifted``:
    each label is predicted by the token before it, so that the first label is not counted."""
    if inputs.items is None or inputs.labels is None:
        return 1.0
    labels = inputs.labels[:, 1:] if shifted else inputs.labels
    return (labels != IGNORED).sum() / inputs.items


def _warn(message: str, output: Any) -> Any:
    if not torch.compiler.is_compiling():
        warnings.warn(message, stacklevel=2)
    return output
