"""The operation as one autograd node, for backends that are made of stages.

Let u = drop(x) · lora_Aᵀ [N, E], c = scaling and v = dy · lora_Bᵀ [N, E]. For one token t of an instance:

    y       += Σ_i c gate_i · u[index_a[i]] · lora_B[index_b[i]]                         (Equations 1 and 9)
    dgate_i  = c Σ_t u[index_a[i]] · v[index_b[i]]              (summed over the instance's tokens)
    du[index_a[i]] = c gate_i · v[index_b[i]]
    dlora_B  = Σ_t sᵀ dy,  s[index_b[i]] = c gate_i · u[index_a[i]]
    dlora_A  = Σ_t duᵀ drop(x)      + the gradient through T of the conditional router
    dx       = Σ_g dy · W + drop(du · lora_A) + mean weight · (dlogits_a · router_A + dlogits_b · router_B)

dgate is propagated through the gate, the softmaxes and T (backends/eager/route.py) to dlogits_a, dlogits_b and dT. A
factor that no instance chose has zero columns in du and s and a zero row in dT: its gradient is exactly zero.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..frozen import frozen_product, frozen_product_backward
from ..routing import Instances, Routing
from .base import DRouting, Factors, FrozenLinear, Group, Needs, Options, Stages

OWN = 8  # inputs of each sibling: y, weight and bias, of which y or weight is None; and five factors
KEPT = 6  # those that the backward reads: all but y and the bias

T = TypeVar("T")


class Staged(Stages):
    """A backend made of stages: what it calls ``apply`` is one autograd node around them."""

    def apply(self, group: Group) -> tuple[Sequence[Tensor], Routing]:
        """``Backend.apply``."""
        own: list[Tensor | None] = []
        for base, factors in zip(group.bases, group.factors):
            own += (None, *base) if isinstance(base, FrozenLinear) else (base, None, None)
            own += factors
        given, G = group.given, len(group.factors)
        gate, index_a, index_b = (None, None, None) if given is None else (given.gate, given.index_a, given.index_b)
        outputs = Node.apply(
            self, group.instances, group.options, group.x, group.read, group.seeds, gate, index_a, index_b, *own
        )
        if given is not None:
            return outputs if G > 1 else (outputs,), given
        if not group.options.tied:
            return outputs[:G], Routing(*outputs[G:])
        index, gate, probs = outputs[G:]
        return outputs[:G], Routing(index, index, gate, probs, probs)


class Node(torch.autograd.Function):
    """The adapters of a group and, where they are given as weights, its frozen products."""

    @staticmethod
    def forward(
        ctx: Any, stages: Stages, instances: Instances, options: Options, x: Tensor, read: Tensor | None,
        seeds: Tensor | None, gate: Any, index_a: Any, index_b: Any, *own: Any,
    ) -> Any:  # fmt: skip
        bases, factors = _split(own)
        given = None
        if index_a is not None:  # the stages do not read a given routing's probabilities
            given = Routing(index_a, index_b, gate, None, None)  # type: ignore[arg-type]
        group = Group(x, bases, factors, read, given, seeds, instances, options)
        routing, saved = stages.project(group)
        fresh = [isinstance(base, FrozenLinear) for base in bases]
        # torch.compile's graphs have no operations in place.
        first = stages.writes_first and all(fresh) and not torch.compiler.is_compiling()
        if first:
            ys, saved = stages.expand(group, None, fresh, routing, saved)
            ys = [
                frozen_product(x, base.weight, base.bias, onto=y)
                for base, y in zip(bases, ys)
                if isinstance(base, FrozenLinear)
            ]
        else:
            ys = [frozen_product(x, *base) if isinstance(base, FrozenLinear) else base for base in bases]
            ys, saved = stages.expand(group, ys, fresh, routing, saved)

        ctx.set_materialize_grads(False)
        ctx.stages, ctx.options, ctx.routed, ctx.device_type = stages, options, given is None, x.device.type
        ctx.first = first
        ctx.ys = [(y.shape, y.dtype) for y in ys]
        learned = any(ctx.needs_input_grad[9 + i] for i in range(len(own)) if i % OWN in (3, 5, 6, 7))
        kept = [tensor for i, tensor in enumerate(own) if i % OWN not in (0, 2)]
        ctx.count, ctx.length, *divided = instances
        ctx.save_for_backward(x if learned else None, read, seeds, *divided, *routing, *kept, *saved)
        if given is not None:
            return ys[0] if len(ys) == 1 else tuple(ys)
        index_a, index_b, gate, probs_a, _ = routing
        ctx.mark_non_differentiable(index_a, index_b, *((gate,) if options.gate == "binary" else ()))
        return (*ys, index_a, gate, probs_a) if options.tied else (*ys, *routing)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            # create_graph=True: a second derivative would lack what the stages keep, which has no graph, and is an
            # error.
            return once_differentiable(Node.backward)(ctx, *grads)
        if autocasts(ctx.device_type):  # if backward() is called under autocast
            with torch.autocast(ctx.device_type, enabled=False):
                return Node.backward(ctx, *grads)
        options, stages, G = ctx.options, ctx.stages, len(ctx.ys)
        x, read, seeds, *tensors = ctx.saved_tensors
        divided, routing, kept, saved = _cut(tensors, len(Instances._fields) - 2, len(Routing._fields), G * KEPT)
        routing, rows = Routing(*routing), [kept[i : i + KEPT] for i in range(0, len(kept), KEPT)]
        bases, factors = [FrozenLinear(row[0], None) for row in rows], [Factors(*row[1:]) for row in rows]
        given = None if ctx.routed else routing
        instances = Instances(ctx.count, ctx.length, *divided)
        group = Group(x, bases, factors, read, given, seeds, instances, options)
        drouting = _drouting(grads[G:], ctx.routed, options.tied)

        # If y of a sibling was not used, it has no gradient, and neither have its factors, unless its probabilities do.
        silent = all(gradient is None for gradient in drouting)
        unused = [dy is None and silent for dy in grads[:G]]
        dys = [
            own.lora_B.new_zeros(shape, dtype=dtype) if dy is None else dy
            for dy, own, (shape, dtype) in zip(grads, factors, ctx.ys)
        ]
        need_x, need_read, _, need_gate = ctx.needs_input_grad[3:7]
        wanted = [ctx.needs_input_grad[9 + g * OWN : 9 + (g + 1) * OWN] for g in range(G)]
        # With a binary gate the routers only learn from a loss on the probabilities.
        routes = ctx.routed and not (options.gate == "binary" and silent)
        routes = routes and (need_x or need_read or any(any(want[3:]) for want in wanted))
        needs = Needs(need_x, any(want[3] for want in wanted), any(want[4] for want in wanted), routes, need_gate)

        dlora_B, dgate, carried = stages.expand_backward(group, dys, drouting, routing, saved, needs)
        dx = frozen_backward(dys, bases) if need_x and not ctx.first else None
        found = stages.project_backward(group, dx, routing, saved, carried, needs)
        dx = frozen_backward(dys, bases, found.x) if need_x and ctx.first else found.x

        down: list[Tensor | None] = []
        for g, want in enumerate(wanted):
            gradients = found.lora_A[g], dlora_B[g], found.router_A[g], found.router_B[g], found.router_AB[g]
            down += (dys[g] if want[0] and not unused[g] else None, None, None)
            down += (
                _as(d, factor.dtype) if want[3 + i] and d is not None and not unused[g] else None
                for i, (d, factor) in enumerate(zip(gradients, rows[g][1:]))
            )
        dread = found.read if need_read else None
        return (None, None, None, dx if need_x else None, dread, None, dgate, None, None, *down)


def frozen_backward(dys: Sequence[Tensor], bases: Sequence[FrozenLinear], dx: Tensor | None = None) -> Tensor | None:
    """dx + Σ_g dy_g · W_g [N, D], added one after the other; None without dx and without weights."""
    for dy, base in zip(dys, bases):
        if base.weight is not None:
            dx = frozen_product_backward(dy, base.weight, dx)
    return dx


def autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # autocast does not know the meta device


def _split(own: Sequence[Any]) -> tuple[list[FrozenLinear | Tensor], list[Factors]]:
    rows = [own[i : i + OWN] for i in range(0, len(own), OWN)]
    return [FrozenLinear(*row[1:3]) if row[0] is None else row[0] for row in rows], [Factors(*row[3:]) for row in rows]


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _cut(tensors: Sequence[T], *lengths: int) -> list[Sequence[T]]:
    """Cut into consecutive pieces of these lengths, and the rest."""
    pieces, start = [], 0
    for length in lengths:
        pieces.append(tensors[start : start + length])
        start += length
    return [*pieces, tensors[start:]]


def _drouting(grads: Sequence[Tensor | None], routed: bool, tied: bool) -> DRouting:
    """Find the gradients of the gate and of the probabilities among those of ``Node``'s outputs."""
    if not routed:
        return None, None, None
    return (grads[1], grads[2], None) if tied else (grads[2], grads[3], grads[4])
