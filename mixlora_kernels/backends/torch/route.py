"""route: from the routers' logits to the factors of each instance, and back.

Everything here is of the size [B, r, E] or of the parameters alone. Equations 6 to 8:

    p_A = softmax(logits_a)                           index_a = top_r(p_A)
    c_i = T[i, :, index_a[i]]                         T[i] = router_AB[i] · lora_Aᵀ
    p_CFS = softmax(Σ_i softmax(c_i))
    p_B = softmax(logits_b) + p_CFS                   index_b = top_r(p_B)

T depends on parameters alone; an instance only looks up r of its columns.
"""

import math

import torch
from torch import Tensor

from ...routing import Instances

_softmax_backward = torch.ops.aten._softmax_backward_data


def condition_table(lora_A: Tensor, router_AB: Tensor, conditioning: str) -> Tensor:
    """T [r, E, E]: what is said of each factor of B (second) by each factor of A in slot i (third)."""
    if conditioning == "published":
        return router_AB.sum(-1)[:, :, None] * lora_A.sum(-1)
    return (router_AB.flatten(0, 1) @ lora_A.T).view(router_AB.shape[0], -1, lora_A.shape[0])


def condition_table_backward(dtable: Tensor, lora_A: Tensor, router_AB: Tensor, conditioning: str):
    """The gradients of ``lora_A`` and ``router_AB`` from that of T."""
    if conditioning == "published":
        dlora_A = (dtable * router_AB.sum(-1)[:, :, None]).sum((0, 1))[:, None].expand_as(lora_A)
        return dlora_A, (dtable * lora_A.sum(-1)).sum(-1)[..., None].expand_as(router_AB)
    dtable = dtable.flatten(0, 1)  # [r * E, E]
    return dtable.T @ router_AB.flatten(0, 1), (dtable @ lora_A).view_as(router_AB)


def top_r(p: Tensor, r: int) -> Tensor:
    # A stable sort, because topk promises nothing about ties; ours go to the lower index.
    return torch.sort(p, dim=-1, descending=True, stable=True)[1][:, :r].contiguous()


def route(logits: Tensor, table: Tensor | None, r: int, gate: str, instances: Instances, tied: bool = False):
    """Choose r factors of A and r of B for each instance, from the routers' logits [B, 2E], those of A first, or, where
    pairs are tied, [B, E].

    Returns ``index_a, index_b, gate, probs_a, probs_b`` as in ``Routing``, and what the backward needs.
    """
    if tied:
        probs_a = torch.softmax(logits, -1)
        index_a = top_r(probs_a, r)
        return index_a, index_a, _gate(gate, r, (probs_a, index_a)), probs_a, probs_a, (None, None, None)
    probs_a, p_ifs = (torch.softmax(part, -1) for part in logits.chunk(2, -1))  # [B, E]
    index_a = top_r(probs_a, r)  # [B, r]
    if table is None:
        probs_b, p_cfs, q = p_ifs, None, None
    else:
        q = torch.softmax(table.gather(2, _columns(index_a, table)), 1)  # [r, E, B]
        p_cfs = torch.softmax(q.sum(0).T, -1)  # [B, E]
        probs_b = p_ifs + p_cfs
    index_b = top_r(probs_b, r)
    weight = _gate(gate, r, (probs_a, index_a), (probs_b, index_b))
    return index_a, index_b, weight, probs_a, probs_b, (p_ifs, p_cfs, q)


def route_backward(dgate, dprobs_a, dprobs_b, index_a, index_b, probs_a, probs_b, saved, gate: str):
    """From the gradients of the gate [B, r] and of the probabilities [B, E] (None where there is none) to those
    of the logits [B, 2E] and of T [r, E, E]; the latter is None without conditioning."""
    p_ifs, p_cfs, q = saved
    mean = {"weighted": 1 / index_a.shape[1], "normalized": 1.0}.get(gate)  # of the shares over the chosen
    if p_ifs is None:  # tied: one probability a slot, which counts once
        da = torch.zeros_like(probs_a)
        if dgate is not None and gate != "binary":
            dchosen = dgate
            if mean is not None:
                dchosen = _share_backward(dgate, *_shares(probs_a, index_a, mean))
            da.scatter_(1, index_a, dchosen)
        for dprobs in (dprobs_a, dprobs_b):
            if dprobs is not None:
                da += dprobs
        return _softmax_backward(da, probs_a, -1, da.dtype), None
    da, db = torch.zeros_like(probs_a), torch.zeros_like(probs_b)
    if dgate is not None and gate != "binary":
        dchosen_a = dchosen_b = dgate
        if mean is not None:
            (share_a, sum_a), (share_b, sum_b) = _shares(probs_a, index_a, mean), _shares(probs_b, index_b, mean)
            dchosen_a = _share_backward(dgate * share_b, share_a, sum_a)
            dchosen_b = _share_backward(dgate * share_a, share_b, sum_b)
        da.scatter_(1, index_a, dchosen_a)
        db.scatter_(1, index_b, dchosen_b)
    if dprobs_a is not None:
        da += dprobs_a
    if dprobs_b is not None:
        db += dprobs_b
    dtable = None
    if q is not None:
        dq = _softmax_backward(db, p_cfs, -1, db.dtype)  # [B, E], the same for every slot
        dc = _softmax_backward(dq.T.expand_as(q), q, 1, q.dtype)  # [r, E, B]
        r, E, _ = q.shape
        dtable = dc.new_zeros(r, E, E).scatter_add_(2, _columns(index_a, q), dc)
    dlogits = _softmax_backward(da, probs_a, -1, da.dtype), _softmax_backward(db, p_ifs, -1, db.dtype)
    return torch.cat(dlogits, -1), dtable


def _columns(index_a: Tensor, like: Tensor) -> Tensor:
    """index_a [B, r] as the index of T's columns, [r, E, B]."""
    return index_a.T.unsqueeze(1).expand(-1, like.shape[1], -1)


def _gate(gate: str, r: int, *choices: tuple[Tensor, Tensor]) -> Tensor:
    """What multiplies each chosen pair [B, r], from the probabilities and indices that chose it."""
    mean = {"weighted": 1 / r, "normalized": 1.0}.get(gate)
    if mean is None:
        probs, index = choices[0]
        return probs.new_ones(index.shape)
    return math.prod(_shares(*choice, mean)[0] for choice in choices)


def _shares(probs: Tensor, index: Tensor, mean: float) -> tuple[Tensor, Tensor]:
    """The chosen probabilities rescaled to that mean over the r chosen [B, r], and what they were divided by [B, 1]."""
    chosen = probs.gather(1, index)
    total = chosen.mean(-1, keepdim=True) / mean
    return chosen / total, total


def _share_backward(dshare: Tensor, share: Tensor, total: Tensor) -> Tensor:
    # Their sum is r times the mean, whatever the probabilities.
    return (dshare - (dshare * share).sum(-1, keepdim=True) / share.sum(-1, keepdim=True)) / total
