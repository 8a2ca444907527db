"""expand: y += Σ_i c gate_i u_i · lora_B[index_b[i]] (Equations 1 and 9), and its backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...routing import Routing
from ..base import DRouting, Group, Needs, Saved
from .rank_r import ChosenRows, add, choose_rows, collect, products


def expand(
    group: Group, ys: Sequence[Tensor] | None, fresh: Sequence[bool], routing: Routing, saved: Saved
) -> tuple[Sequence[Tensor], Saved]:
    """``Stages.expand``. It returns ``saved``, the result of ``project``, unchanged."""
    if ys is None:
        raise ValueError("the torch backend adds to the frozen products, which therefore run first, got none")
    s = _weigh(saved[0], group, routing)
    # Not in place under torch.compile: its graphs have no operations in place, and torch 2.11 loses the gradient of a
    # tensor that one has changed (pytorch/pytorch#180642).
    in_place = [own and not torch.compiler.is_compiling() for own in fresh]
    parts = s.chunk(len(ys), -1)
    return [add(y, parts[g], _chosen_rows(group, routing, g), in_place[g]) for g, y in enumerate(ys)], saved


def expand_backward(
    group: Group, dys: Sequence[Tensor], drouting: DRouting, routing: Routing, saved: Saved, needs: Needs
) -> tuple[Sequence[Tensor | None], Tensor | None, Saved]:
    """``Stages.expand_backward``. For ``project_backward`` it returns du [N, G * R], the whole gradient of the gate,
    and the gradients of the probabilities."""
    u, G = saved[0], len(dys)
    parts = _weigh(u, group, routing).chunk(G, -1) if needs.lora_B else ()
    dlora_B: list[Tensor | None] = [None] * G
    vs = []
    for g, dy in enumerate(dys):
        chosen = _chosen_rows(group, routing, g)
        dy = dy.to(group.options.dtype)  # y has the base's dtype, in which the update was added
        vs.append(products(dy, chosen))
        if needs.lora_B:
            dlora_B[g] = collect(parts[g], dy, chosen)
    v = vs[0] if G == 1 else torch.cat(vs, -1)
    dgate, *dprobs = drouting
    if needs.gate or (needs.routers and group.options.gate != "binary"):
        B, instances = group.instances.count, group.instances
        dgate_y = instances.sum(instances.by_token(u * v), routing.gate.dtype) * group.options.scale
        dgate_y = dgate_y.view(B, G, group.options.r).transpose(0, 1)
        dgate = dgate_y if dgate is None else dgate_y + dgate
    return dlora_B, dgate if needs.gate else None, (_weigh(v, group, routing), dgate, *dprobs)


def _weigh(values: Tensor, group: Group, routing: Routing) -> Tensor:
    """c · gate · values [N, G * R]. The product is taken in the gate's precision: a rounded gate would shift all tokens
    of an instance in the same direction."""
    G, B, R = routing.gate.shape
    weight = (routing.gate * group.options.scale).transpose(0, 1).reshape(B, G * R)
    weighed = (group.instances.by_token(values) * group.instances.expand(weight)).view(values.shape)
    return weighed if weighed.dtype is values.dtype else weighed.to(values.dtype)


def _chosen_rows(group: Group, routing: Routing, g: int) -> ChosenRows:
    dtype = group.options.dtype
    return choose_rows([group.factors[g].lora_B], routing.index_b[g : g + 1], group.instances, dtype)
