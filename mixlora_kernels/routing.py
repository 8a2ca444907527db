"""Which tokens form an instance (RoutingContext, Instances), and which factors were chosen for it (Routing)."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The factors chosen for each of B instances. Slot i of A is paired with slot i of B.

    Attributes:
        index_a, index_b: [B, r] int64, the chosen factors, most probable first.
        gate: [B, r], the number that multiplies each pair.
        probs_a, probs_b: [B, E], p_A of Equation 6 and p_IFS + p_CFS of Equation 8; 1/E for random routing.
            They are float32, or float64 for float64 input, and differentiable, so that a loss may use them.
    """

    index_a: Tensor
    index_b: Tensor
    gate: Tensor
    probs_a: Tensor
    probs_b: Tensor

    def detach(self) -> "Routing":
        """The same routing without its autograd graph, to be kept beyond one step."""
        return Routing(*(tensor.detach() for tensor in self))

    def prepare(self, dtype: torch.dtype) -> "Routing":
        """The same routing with contiguous tensors and a gate of this precision at least; itself if it has them. A
        product with a gate of lower precision would be rounded to that."""
        if self.gate.dtype is dtype and all(tensor.is_contiguous() for tensor in self):
            return self
        index_a, index_b, gate, probs_a, probs_b = (tensor.contiguous() for tensor in self)
        return Routing(index_a, index_b, gate.to(torch.promote_types(gate.dtype, dtype)), probs_a, probs_b)

    def member(self, g: int) -> "Routing":
        """The routing of sibling g, from a group's routing with tensors [G, B, ...]."""
        return Routing(*(tensor[g] for tensor in self))

    def unsqueeze(self) -> "Routing":
        """The same routing as that of a group of one sibling, [1, B, ...]."""
        return Routing(*(tensor.unsqueeze(0) for tensor in self))


class Instances(NamedTuple):
    """How N tokens divide into B instances: rows of equal length, or segments packed end to end.

    Attributes:
        count: B.
        length: L if every instance is a row of L tokens; None if instances are packed.
        cu_seqlens, segment: of packed instances, the index of each one's first token, and N at the end [B + 1]; and the
            instance of each token [N]. Both int64; None for rows.
        mask: [N] bool, the tokens that the mean runs over; None: all.
        mean_weights: the weight of one token in its instance's mean, 1 / (number of tokens in the mean), [B, 1] in the
            precision of routing. None if the mean runs over all tokens of each row, or if no mean is needed.
    """

    count: int  # type: ignore[assignment]  # tuple has a method of this name, which this package never calls
    length: int | None
    cu_seqlens: Tensor | None = None
    segment: Tensor | None = None
    mask: Tensor | None = None
    mean_weights: Tensor | None = None

    def mean_weight(self) -> Tensor | float:
        """The weight of one token in its instance's mean: [B, 1], or one number for all."""
        return 1.0 / (self.length or 1) if self.mean_weights is None else self.mean_weights

    def by_token(self, values: Tensor) -> Tensor:
        """View [N, K] in the shape of ``expand``'s results: [B, L, K] for rows, [N, K] for packed instances."""
        return values if self.length is None else values.view(self.count, self.length, values.shape[-1])

    def instance_of_token(self, device: torch.device) -> Tensor:
        """The instance of each token, [N] int64."""
        if self.length is not None:
            return torch.arange(self.count, device=device).repeat_interleave(self.length)
        return packed(self.segment)

    def expand(self, values: Tensor) -> Tensor:
        """Repeat each instance's values for its tokens: [B, K] -> [B, L, K] without a copy for rows, or [N, K] if
        packed."""
        if self.length is not None:
            return values.unsqueeze(1).expand(-1, self.length, -1)
        return values[packed(self.segment)]

    def sum(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum over each instance's tokens: [B, L, K] or [N, K] -> [B, K]. The adjoint of ``expand``."""
        if self.length is not None:
            return values.sum(dim=1, dtype=dtype)
        running = running_dtype(dtype, values.device)
        total = values.new_zeros(self.count, values.shape[-1], dtype=running)
        return total.index_add_(0, packed(self.segment), values.to(running)).to(dtype)


class RoutingContext(NamedTuple):
    """What routing needs to know about a layer's input beside the hidden states. Every field is optional.

    Attributes:
        mask: [B, L] bool or integer, [N] for packed input. True or a nonzero value marks the tokens that an
            instance's mean runs over. The update is applied to every token.
        cu_seqlens: [B + 1] int32 or int64, the index of each packed instance's first token, and N at the end.
        task: [B, d_task] or [B, T, d_task], the task embedding of each instance, for ``routing="task"``.
        task_mask: [B, T] bool or integer, the tokens of the task embedding that its mean runs over.
        routing: a routing to reuse. No new one is computed.
        instances: the result of ``find_instances`` for the other fields, if it has been computed.
    """

    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    task: Tensor | None = None
    task_mask: Tensor | None = None
    routing: Routing | None = None
    instances: Instances | None = None

    # Not _replace, which torch 2.6 cannot compile.

    def unsqueeze(self) -> "RoutingContext":
        """The same context as that of a group of one sibling, whose routing has tensors [1, B, ...]."""
        given = None if self.routing is None else self.routing.unsqueeze()
        return RoutingContext(self.mask, self.cu_seqlens, self.task, self.task_mask, given, self.instances)

    def to(self, device: torch.device) -> "RoutingContext":
        """The same context with its masks, lengths and task embedding on this device."""
        tensors = (self.mask, self.cu_seqlens, self.task, self.task_mask)
        if all(tensor is None or tensor.device == device for tensor in tensors):
            return self
        mask, cu_seqlens, task, task_mask = (None if tensor is None else tensor.to(device) for tensor in tensors)
        return RoutingContext(mask, cu_seqlens, task, task_mask, self.routing, self.instances)

    def with_instances(self, instances: Instances) -> "RoutingContext":
        """The same context with these instances, which need not be found again."""
        return RoutingContext(self.mask, self.cu_seqlens, self.task, self.task_mask, self.routing, instances)


def find_instances(x: Tensor, context: RoutingContext, needs_mean: bool) -> Instances:
    """Find the instances in a layer's input [B, ..., d_in] or [L, d_in], with the help of its context.

    Args:
        needs_mean: whether Equation 5's mean will be computed. Every instance then needs a token in its mean.

    Raises:
        TypeError: ``mask`` or ``cu_seqlens`` is no tensor or has a wrong dtype.
        ValueError: the shape, device or values of one of them do not fit the input.
    """
    tokens = x.shape[:-1].numel()
    for name, tensor in (("mask", context.mask), ("cu_seqlens", context.cu_seqlens)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    given = context.cu_seqlens
    packed = given is not None
    if packed and x.dim() > 2 and x.shape[:-2].numel() != 1:
        raise ValueError(f"cu_seqlens needs packed x, [N, d_in] or [1, N, d_in], got x of shape {tuple(x.shape)}")
    count = given.numel() - 1 if given is not None else x.shape[0] if x.dim() > 2 else 1
    cu_seqlens = segment = None
    if given is not None:
        cu_seqlens = _check_cu_seqlens(given, x, tokens)
        segment = torch.bucketize(torch.arange(tokens, device=x.device), cu_seqlens[1:], right=True)
    length = None if packed else x.shape[-2] if x.dim() == 2 else x.shape[1:-1].numel()
    mask = None if context.mask is None else _check_mask(context.mask, x, count, packed)
    if mask is not None and can_look(mask) and bool(mask.all()):
        mask = None
    instances = Instances(count, length, cu_seqlens, segment, mask)
    if not needs_mean:
        return instances
    _check_pooled(instances)
    mean_weights = _find_mean_weights(instances, torch.promote_types(x.dtype, torch.float32))
    return Instances(count, length, cu_seqlens, segment, mask, mean_weights)


def running_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype for a sum in ``dtype`` to which ``index_add_`` adds one token after the other: float64 on a CPU, where
    the errors of a long running sum in float32 would add up. On a GPU, float64 would cost too much."""
    return torch.float64 if dtype is torch.float32 and device.type == "cpu" else dtype


def packed(tensor: Tensor | None) -> Tensor:
    """Return the ``cu_seqlens`` or the ``segment`` of packed instances, or raise a ValueError if it is None."""
    if tensor is None:
        raise ValueError("packed instances (length=None) need cu_seqlens and segment, got None")
    return tensor


def _find_mean_weights(instances: Instances, dtype: torch.dtype) -> Tensor | None:
    """The ``mean_weights``. An instance without a token in its mean gets a mean of 0: the CPU refuses it earlier, but
    on a GPU a look at the mask would make the host wait."""
    if instances.mask is not None:
        pooled = instances.sum(instances.by_token(instances.mask.unsqueeze(-1)), dtype)
    elif instances.length is not None:
        return None
    else:
        pooled = packed(instances.cu_seqlens).diff().unsqueeze(-1).to(dtype)
    return 1.0 / pooled.clamp(min=1)


def find_task(context: RoutingContext, count: int, d_task: int) -> Tensor:
    """Equation 10: the mean of each instance's task embedding, [B, d_task].

    Raises:
        TypeError: ``task`` does not have a floating dtype, or ``task_mask`` has one.
        ValueError: ``task`` is missing, or a shape does not fit.
    """
    task, mask = context.task, context.task_mask
    if task is None:
        raise ValueError(f"routing='task' needs RoutingContext(task=...) of shape [B, {d_task}] or [B, T, {d_task}]")
    if not task.is_floating_point():
        raise TypeError(f"task must have a floating dtype, got {task.dtype}")
    if task.dim() not in (2, 3) or task.shape[0] != count or task.shape[-1] != d_task or 0 in task.shape[1:]:
        raise ValueError(
            f"task must have the shape [B, d_task] or [B, T, d_task] with B={count} and d_task={d_task}, "
            f"got {tuple(task.shape)}"
        )
    task = task.to(torch.promote_types(task.dtype, torch.float32))
    if mask is None:
        return task if task.dim() == 2 else task.mean(dim=1)
    if task.dim() != 3 or mask.shape != task.shape[:2]:
        raise ValueError(
            f"task_mask must have the shape [B, T] of task [B, T, d_task], got {tuple(mask.shape)} "
            f"and task {tuple(task.shape)}"
        )
    mask = _as_bool(mask, "task_mask")
    if can_look(mask) and not mask.any(dim=1).all():
        raise ValueError("every instance needs a token of its task embedding, got a task_mask with a row without any")
    return task.masked_fill(~mask.unsqueeze(-1), 0).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _as_bool(mask: Tensor, name: str) -> Tensor:
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"{name} must be bool or integer, got {mask.dtype}")
    return mask if mask.dtype == torch.bool else mask != 0


def can_look(tensor: Tensor) -> bool:
    """Whether the host may read the tensor's values. On a GPU it would have to wait for the device, and under
    torch.compile the read would break the graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_mask(mask: Tensor, x: Tensor, count: int, packed: bool) -> Tensor:
    tokens = x.shape[:-1].numel()
    shapes = [tuple(x.shape[:-1])] + ([(tokens,), (1, tokens)] if packed or count == 1 else [])
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"mask must have the shape {shapes[0]} of x without d_in, got {tuple(mask.shape)}")
    _check_device(mask, x, "mask")
    return _as_bool(mask, "mask").reshape(-1).contiguous()


def _check_cu_seqlens(cu_seqlens: Tensor, x: Tensor, tokens: int) -> Tensor:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have the shape [B + 1], got {tuple(cu_seqlens.shape)}")
    _check_device(cu_seqlens, x, "cu_seqlens")
    if can_look(cu_seqlens):
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts[-1] != tokens or min(b - a for a, b in pairwise(starts)) < 1:
            raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens of x, got {starts}")
    return cu_seqlens.long().contiguous()


def _check_pooled(instances: Instances) -> None:
    if instances.length == 0 and instances.count:
        raise ValueError("every instance needs a pooled token, got instances of length 0")
    mask = instances.mask
    if mask is not None and can_look(mask):
        empty = (
            (instances.sum(instances.by_token(mask.unsqueeze(-1)), torch.int64) == 0)
            .flatten()
            .nonzero()
            .flatten()
            .tolist()
        )
        if empty:
            raise ValueError(f"every instance needs a pooled token, got a mask with none for instances {empty}")


def _check_device(tensor: Tensor, x: Tensor, name: str) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
