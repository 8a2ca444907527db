"""Rows of a batch: taken as instances, chosen, and repeated."""

from torch import Tensor

from ..routing import RoutingContext


def rows_as_instances(x: Tensor) -> Tensor:
    """Take each row of an input [B, d_in] as an instance of one token, because nothing tells how they form
    sequences."""
    return x.unsqueeze(1) if x.dim() == 2 else x


def of_rows(context: RoutingContext, rows: list[int]) -> RoutingContext:
    """The context of these rows alone.

    Raises:
        ValueError: the instances are packed, and no rows.
    """
    if context.cu_seqlens is not None:
        raise ValueError("adapter_names chooses an adapter for each row, which packed instances do not have")
    task, task_mask = (None if tensor is None else tensor[rows] for tensor in (context.task, context.task_mask))
    return RoutingContext(None if context.mask is None else context.mask[rows], task=task, task_mask=task_mask)


def expand_rows(tensor: Tensor | None, count: int) -> Tensor | None:
    """Repeat each instance's entry, as generate() repeats rows for beams and returned sequences."""
    if tensor is None or tensor.shape[0] == count or count % tensor.shape[0]:
        return tensor
    return tensor.repeat_interleave(count // tensor.shape[0], dim=0)
