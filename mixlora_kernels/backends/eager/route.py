"""route: choose each instance's factors from the routers' input, and its backward.

No tensor here depends on the number of tokens. Equations 6 to 8, for each sibling:

    p_A = softmax(logits_a)                           index_a = top_r(p_A)
    c_i = T[i, :, index_a[i]]                         T[i] = router_AB[i] · lora_Aᵀ
    p_CFS = softmax(Σ_i softmax(c_i))
    p_B = softmax(logits_b) + p_CFS                   index_b = top_r(p_B)

T depends on parameters alone, and an instance only looks up r of its columns. Tied pairs have index_b = index_a.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ...routing import Routing
from ..base import DRouting, Factors, Options, Saved

_softmax_backward = torch.ops.aten._softmax_backward_data


class RouterGradients(NamedTuple):
    """The result of ``route_backward``: gradients of ``read``, and of each sibling's parameters; None if they have
    none."""

    read: Tensor  # [B, d_route]
    lora_A: Sequence[Tensor] | None  # the part that comes through T
    router_A: Sequence[Tensor]
    router_B: Sequence[Tensor] | None
    router_AB: Sequence[Tensor] | None


def route(read: Tensor, factors: Sequence[Factors], options: Options) -> tuple[Routing, Saved]:
    """Choose r factors of A and r of B for each of G siblings and B instances.

    Args:
        read: the routers' input [B, d_route], in the precision of routing.

    Returns:
        The routing with tensors [G, B, ...]; and for the backward p_IFS and p_CFS [G, B, E], and q [G, R, E, B].
    """
    logits = torch.stack([router_logits(read, router) for router in list_routers(factors, options)])
    logits_a, logits_b = logits[: len(factors)], None if options.tied else logits[len(factors) :]
    table = None
    if options.conditioning is not None:
        table = torch.stack([condition_table(*_conditional(own, options), options.conditioning) for own in factors])
    return choose_factors(logits_a, logits_b, table, options.r, options.gate)


def router_logits(read: Tensor, router: Tensor) -> Tensor:
    """read [B, d_route] · router [E, d_route]ᵀ, computed as router · readᵀ -> [B, E].

    Each router has a product of its own, so that a sibling has the bits of a single layer. Rows of zeros give logits of
    exactly 0. Other equal rows give logits that are equal up to rounding, because a product may add up a row's terms in
    an order that depends on its place. A sum for each logit would not, but takes several times as long and
    [B, E, d_route] numbers.
    """
    return (router.to(read.dtype) @ read.T).T


def choose_factors(
    logits_a: Tensor, logits_b: Tensor | None, table: Tensor | None, r: int, gate: str
) -> tuple[Routing, Saved]:
    """Equations 6 to 8, from the routers' logits [G, B, E] and T [G, R, E, E].

    ``logits_b`` is None for tied pairs, ``table`` is None without conditioning. Returns the same as ``route``.
    """
    probs_a = torch.softmax(logits_a, -1)  # Equation 6
    index_a = top_r(probs_a, r)
    if logits_b is None:
        weight = _gate(gate, (probs_a, index_a))
        return Routing(index_a, index_a, weight, probs_a, probs_a), (None, None, None)
    probs_b = p_ifs = torch.softmax(logits_b, -1)
    p_cfs = q = None
    if table is not None:
        q = torch.softmax(table.gather(3, _columns(index_a, table.shape[2])), 2)  # Equation 7: [G, R, E, B]
        p_cfs = torch.softmax(q.sum(1).transpose(1, 2), -1)
        probs_b = p_ifs + p_cfs  # Equation 8
    index_b = top_r(probs_b, r)
    weight = _gate(gate, (probs_a, index_a), (probs_b, index_b))
    return Routing(index_a, index_b, weight, probs_a, probs_b), (p_ifs, p_cfs, q)


def route_backward(
    drouting: DRouting, read: Tensor, factors: Sequence[Factors], routing: Routing, saved: Saved, options: Options
) -> RouterGradients:
    """Propagate the gradients of the gate [G, B, R] and of the probabilities [G, B, E], or None, to the routers."""
    (dgate, dprobs_a, dprobs_b), (p_ifs, p_cfs, q) = drouting, saved
    index_a, index_b, _, probs_a, probs_b = routing
    choices = [(probs_a, index_a)] if options.tied else [(probs_a, index_a), (probs_b, index_b)]
    dprobs = [torch.zeros_like(probs) for probs, _ in choices]
    if dgate is not None and options.gate != "binary":
        for target, (_, index), dp in zip(dprobs, choices, _gate_backward(options.gate, dgate, choices)):
            target.scatter_(-1, index, dp)
    for g, given in enumerate((dprobs_a, dprobs_b)):
        if given is not None:
            dprobs[g % len(dprobs)] += given
    dlogits = [_softmax_backward(dprobs[0], probs_a, -1, probs_a.dtype)]
    G = len(factors)
    dlora_A = drouter_AB = None
    if not options.tied:
        dlogits.append(_softmax_backward(dprobs[1], p_ifs, -1, p_ifs.dtype))
        if options.conditioning is not None:
            dq = _softmax_backward(dprobs[1], p_cfs, -1, p_cfs.dtype)  # [G, B, E], the same for every slot
            dc = _softmax_backward(dq.transpose(1, 2).unsqueeze(1).expand_as(q), q, 2, q.dtype)  # [G, R, E, B]
            dtable = dc.new_zeros(*q.shape[:3], q.shape[2]).scatter_add_(3, _columns(index_a, q.shape[2]), dc)
            dlora_A, drouter_AB = zip(
                *[
                    condition_table_backward(d, *_conditional(own, options), options.conditioning)
                    for d, own in zip(dtable, factors)
                ]
            )
    stacked = (dlogits[0] if options.tied else torch.cat(dlogits)).transpose(0, 1).flatten(1)  # [B, (2 *) G * E]
    drouters = (stacked.T @ read).chunk(len(dlogits) * G)
    dread = stacked @ torch.cat(list_routers(factors, options)).to(stacked.dtype)
    return RouterGradients(dread, dlora_A, drouters[:G], None if options.tied else drouters[G:], drouter_AB)


def list_routers(factors: Sequence[Factors], options: Options) -> list[Tensor]:
    """The siblings' routers [E, d_route]: A's, and then B's unless pairs are tied."""
    routers = [required(own.router_A, "router_A") for own in factors]
    return routers if options.tied else routers + [required(own.router_B, "router_B") for own in factors]


def required(tensor: Tensor | None, name: str) -> Tensor:
    """Return the tensor, or raise a ValueError if it is None."""
    if tensor is None:
        raise ValueError(f"the configuration needs {name}, got None")
    return tensor


def _conditional(factors: Factors, options: Options) -> tuple[Tensor, Tensor]:
    """The parameters that T is computed from, in the precision of routing."""
    return factors.lora_A.to(options.precise), required(factors.router_AB, "router_AB").to(options.precise)


def condition_table(lora_A: Tensor, router_AB: Tensor, conditioning: str) -> Tensor:
    """T [R, E, E] from lora_A [E, D] and router_AB [R, E, D], all in the precision of routing. T[i, e, f] is the logit
    of B's factor e if A's factor f was chosen for slot i."""
    if conditioning == "published":
        return router_AB.sum(-1)[:, :, None] * lora_A.sum(-1)
    return (router_AB.flatten(0, 1) @ lora_A.T).view(router_AB.shape[0], -1, lora_A.shape[0])


def condition_table_backward(
    dtable: Tensor, lora_A: Tensor, router_AB: Tensor, conditioning: str
) -> tuple[Tensor, Tensor]:
    """The gradients of ``lora_A`` and ``router_AB``, from the gradient of T."""
    if conditioning == "published":
        dlora_A = (dtable * router_AB.sum(-1)[:, :, None]).sum((0, 1))[:, None].expand_as(lora_A)
        return dlora_A, (dtable * lora_A.sum(-1)).sum(-1)[..., None].expand_as(router_AB)
    dtable = dtable.flatten(0, 1)  # [R * E, E]
    return dtable.T @ router_AB.flatten(0, 1), (dtable @ lora_A).view_as(router_AB)


def top_r(p: Tensor, r: int) -> Tensor:
    """The indices of the r largest entries, largest first. Of equal entries the lower index comes first."""
    # A stable sort, because topk does not define the order of equal entries.
    return torch.sort(p, dim=-1, descending=True, stable=True)[1][..., :r].contiguous()


def _columns(index_a: Tensor, E: int) -> Tensor:
    """index_a [G, B, R] as an index of T's columns, [G, R, E, B]."""
    return index_a.transpose(1, 2).unsqueeze(2).expand(-1, -1, E, -1)


def _gate(gate: str, *choices: tuple[Tensor, Tensor]) -> Tensor:
    """The gate of each chosen pair [G, B, R], from the probabilities and the chosen indices of A, and of B."""
    if gate in ("straight_through", "binary"):
        probs, index = choices[0]
        return probs.new_ones(index.shape)
    return reduce(torch.mul, [_renormalise(gate, *choice)[0] for choice in choices])


def _gate_backward(gate: str, dgate: Tensor, choices: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The gradients of the chosen factors' probabilities [G, B, R], for A and for B."""
    if gate == "straight_through":
        return [dgate] * len(choices)
    parts = [_renormalise(gate, *choice) for choice in choices]
    gradients = []
    for i, (p, total) in enumerate(parts):
        dp = reduce(torch.mul, [other for j, (other, _) in enumerate(parts) if j != i], dgate)
        # The sum of the renormalised p is constant, so the mean gradient, weighted by p, is subtracted.
        gradients.append((dp - (dp * p).sum(-1, keepdim=True) / p.sum(-1, keepdim=True)) / total)
    return gradients


def _renormalise(gate: str, probs: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Divide the chosen factors' probabilities [G, B, R] by their sum, or by their mean if the gate is normalized.
    Return the quotient and the divisor."""
    p = probs.gather(-1, index)
    total = p.mean(-1, keepdim=True) if gate == "normalized" else p.sum(-1, keepdim=True)
    return p / total, total
