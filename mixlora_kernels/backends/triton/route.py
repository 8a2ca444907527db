"""route: from the routers' sums to the factors of each instance, in one launch, and back in one more.

Equations 6 to 8, one program for an instance, everything in float32:

    p_A = softmax(z_a)       index_a = top_r(p_A)       q_i = softmax(T[i, :, index_a[i]])
    p_CFS = softmax(Σ_i q_i)       p_B = softmax(z_b) + p_CFS       index_b = top_r(p_B)

z are the logits: the sums that ``project`` left, over the number of pooled tokens; or given as they are (task
routing). T depends on the parameters alone and is a product of torch's (backends/torch/route.py). The backward
returns the gradient of the sums: that of the logits, over the number of pooled tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...routing import Instances
from .launch import launch, register
from .project import Sums
from .tiles import find_tiles, padded_count


def route(logits: Tensor | Sums, table: Tensor | None, r: int, gate: str, instances: Instances, tied: bool = False):
    """Choose r factors of A and r of B for each instance.

    Args:
        logits: the logits [B, 2E], or the sums that ``project`` left.
        table: T [r, E, E], or None.
        tied: always False: the choice of a backend keeps tied pairs away.

    Returns:
        ``index_a, index_b, gate, probs_a, probs_b`` as in ``Routing``, and what the backward needs.
    """
    logits, rows = logits if isinstance(logits, Sums) else (logits, 0)
    *routing, p_ifs, p_cfs, q, share = route_op(
        logits, table, instances.cu_seqlens, instances.mask if rows else None,
        instances.count, instances.length or 0, rows, r, gate,
    )  # fmt: skip
    return *routing, (p_ifs, p_cfs, q, share)


@triton.jit
def softmax(z, inside):
    """Of the elements that are inside; the others get 0."""
    z = tl.where(inside, z, float("-inf"))
    shifted = tl.exp(z - tl.max(z, 0))
    return shifted / tl.sum(shifted, 0)


@triton.jit
def softmax_backward(dp, p):
    return p * (dp - tl.sum(p * dp, 0))


@triton.jit
def largest(left, e, E_PAD: tl.constexpr):
    """The index of the largest element; of equal ones the lower index."""
    return tl.min(tl.where(left == tl.max(left, 0), e, E_PAD - 1), 0)


@triton.jit
def by_rank(p, inside):
    """p to choose from. What is no number counts as the largest, as in torch's sort: an index is always valid."""
    return tl.where(inside, tl.where(p == p, p, float("inf")), float("-inf"))


@triton.jit(do_not_specialize=["B", "L", "tiles"])
def route_kernel(
    logits, table, cu_seqlens, mask, index_a, index_b, gate, probs_a, probs_b, p_ifs, p_cfs, q, share, B, L, tiles,
    S: tl.constexpr, E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr, R_PAD: tl.constexpr, B_PAD: tl.constexpr,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    e, slots = tl.arange(0, E_PAD), tl.arange(0, R_PAD)
    inside = e < E
    row = b * E + e
    if S == 0:
        z_a = tl.load(logits + b * 2 * E + e, mask=inside, other=0.0).to(tl.float32)
        z_b = tl.load(logits + b * 2 * E + E + e, mask=inside, other=0.0).to(tl.float32)
    else:
        first, count, length = find_tiles(b, cu_seqlens, B, L, TILE, B_PAD)
        sum_a = tl.zeros([BLOCK_K, E_PAD], tl.float32)
        sum_b = tl.zeros([BLOCK_K, E_PAD], tl.float32)
        for start in range(0, S * count, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            place = logits + ((k // count) * tiles + first + k % count)[:, None] * 2 * E + e[None, :]
            there = (k < S * count)[:, None] & inside[None, :]
            sum_a += tl.load(place, mask=there, other=0.0)
            sum_b += tl.load(place + E, mask=there, other=0.0)
        pooled = length
        if mask is not None:
            begin = b.to(tl.int64) * L
            if cu_seqlens is not None:
                begin = tl.load(cu_seqlens + b)
            hits = tl.zeros([BLOCK_L], tl.int32)
            for start in range(0, length, BLOCK_L):
                t = start + tl.arange(0, BLOCK_L)
                hits += tl.load(mask + begin + t, mask=t < length, other=0).to(tl.int32)
            pooled = tl.sum(hits, 0)
        part = 1.0 / tl.maximum(pooled, 1).to(tl.float32)
        tl.store(share + b, part)
        z_a, z_b = tl.sum(sum_a, 0) * part, tl.sum(sum_b, 0) * part

    p_a = softmax(z_a, inside)
    tl.store(probs_a + row, p_a, mask=inside)
    p_b = softmax(z_b, inside)
    tl.store(p_ifs + row, p_b, mask=inside)
    chosen = tl.zeros([R_PAD], tl.int64)
    weight = tl.full([R_PAD], 1.0, tl.float32)
    said = tl.zeros([E_PAD], tl.float32)
    left = by_rank(p_a, inside)
    for i in range(R):
        best = largest(left, e, E_PAD)
        left = tl.where(e == best, float("-inf"), left)
        chosen = tl.where(slots == i, best, chosen)
        if WEIGHTED:
            weight = tl.where(slots == i, tl.sum(tl.where(e == best, p_a, 0.0), 0), weight)
        if table is not None:
            q_i = softmax(tl.load(table + (i * E + e) * E + best, mask=inside, other=0.0), inside)
            tl.store(q + (b * R + i) * E + e, q_i, mask=inside)
            said += q_i
    tl.store(index_a + b * R + slots, chosen, mask=slots < R)
    if WEIGHTED:
        weight /= tl.sum(tl.where(slots < R, weight, 0.0), 0)
    if table is not None:
        conditional = softmax(said, inside)
        tl.store(p_cfs + row, conditional, mask=inside)
        p_b += conditional
    tl.store(probs_b + row, p_b, mask=inside)

    weight_b = tl.full([R_PAD], 1.0, tl.float32)
    left = by_rank(p_b, inside)
    for i in range(R):
        best = largest(left, e, E_PAD)
        left = tl.where(e == best, float("-inf"), left)
        chosen = tl.where(slots == i, best, chosen)
        if WEIGHTED:
            weight_b = tl.where(slots == i, tl.sum(tl.where(e == best, p_b, 0.0), 0), weight_b)
    tl.store(index_b + b * R + slots, chosen, mask=slots < R)
    if WEIGHTED:
        weight *= weight_b / tl.sum(tl.where(slots < R, weight_b, 0.0), 0)
    tl.store(gate + b * R + slots, weight, mask=slots < R)


def fake_route(logits, table, cu_seqlens, mask, B, L, rows, r, gate):
    E = logits.shape[-1] // 2
    index, real = (logits.new_empty(B, r, dtype=torch.int64) for _ in "ab"), {"dtype": torch.float32}
    conditioned = 0 if table is None else B
    return (
        *index, logits.new_empty(B, r, **real), *(logits.new_empty(B, E, **real) for _ in range(3)),
        logits.new_empty(conditioned, E, **real), logits.new_empty(conditioned, r, E, **real),
        logits.new_empty(B if logits.dim() == 3 else 0, **real),
    )  # fmt: skip


def launch_route(logits, table, cu_seqlens, mask, B, L, rows, r, gate):
    outputs = fake_route(logits, table, cu_seqlens, mask, B, L, rows, r, gate)
    E, pools, packed = logits.shape[-1] // 2, logits.dim() == 3, cu_seqlens is not None
    splits, tiles = logits.shape[:2] if pools else (0, 0)
    launch(
        route_kernel, (B,), logits.device,
        logits.contiguous(), table, cu_seqlens, mask, *outputs, B, L, tiles,
        S=splits, E=E, R=r, E_PAD=triton.next_power_of_2(E), R_PAD=triton.next_power_of_2(r),
        B_PAD=padded_count(B, packed), TILE=rows, BLOCK_K=16, BLOCK_L=1024,
        WEIGHTED=gate == "weighted", num_warps=1,
    )  # fmt: skip
    return outputs


route_op = register(
    "route(Tensor logits, Tensor? table, Tensor? cu_seqlens, Tensor? mask, SymInt B, SymInt L, int rows, int r, "
    "str gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launch_route,
    fake_route,
)


def route_backward(dgate, dprobs_a, dprobs_b, index_a, index_b, probs_a, probs_b, saved, gate: str):
    """From the gradients of the gate [B, R] and of the probabilities [B, E] (None where there is none) to those of
    the logits, or of the sums they were taken from, [B, 2E], and of T [r, E, E]; the latter is None without T."""
    p_ifs, p_cfs, q, share = saved
    dlogits, dtable = route_backward_op(
        None if gate == "binary" else dgate, dprobs_a, dprobs_b, index_a, index_b, probs_a, probs_b,
        p_ifs, p_cfs if q.numel() else None, q if q.numel() else None, share if share.numel() else None, gate,
    )  # fmt: skip
    return dlogits, (dtable if q.numel() else None)


@triton.jit
def probability_gradient(
    b, dgate, dprobs, index, probs, other_index, other_probs,
    E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr, R_PAD: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """The gradient of one pool's probabilities [E_PAD]: as the gate's, in the chosen ones, and as they are returned."""
    e, slots = tl.arange(0, E_PAD), tl.arange(0, R_PAD)
    dp = tl.zeros([E_PAD], tl.float32)
    if dgate is not None:
        there = slots < R
        chosen = tl.load(index + b * R + slots, mask=there, other=-1)
        dchosen = tl.load(dgate + b * R + slots, mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:  # gate = share · other's share, share = p / Σ p over the chosen
            p = tl.load(probs + b * E + chosen, mask=there, other=0.0)
            other = tl.load(other_index + b * R + slots, mask=there, other=0)
            other_p = tl.load(other_probs + b * E + other, mask=there, other=0.0)
            dshare = dchosen * other_p / tl.sum(other_p, 0)
            total = tl.sum(p, 0)
            dchosen = (dshare - tl.sum(dshare * p, 0) / total) / total
        dp = tl.sum(tl.where(chosen[:, None] == e[None, :], dchosen[:, None], 0.0), 0)
    if dprobs is not None:
        dp += tl.load(dprobs + b * E + e, mask=e < E, other=0.0)
    return dp


@triton.jit(do_not_specialize=["B"])
def route_backward_kernel(
    dgate, dprobs_a, dprobs_b, index_a, index_b, probs_a, probs_b, p_ifs, p_cfs, q, share, dlogits, dtable, B,
    E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr, R_PAD: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """The first B programs take an instance's logits; the others a column of T, over the instances that read it."""
    role = tl.program_id(0)
    e = tl.arange(0, E_PAD)
    inside = e < E
    if role < B:
        part = 1.0
        if share is not None:
            part = tl.load(share + role)
        da = probability_gradient(
            role, dgate, dprobs_a, index_a, probs_a, index_b, probs_b, E, R, E_PAD, R_PAD, WEIGHTED
        )
        db = probability_gradient(
            role, dgate, dprobs_b, index_b, probs_b, index_a, probs_a, E, R, E_PAD, R_PAD, WEIGHTED
        )
        p_a = tl.load(probs_a + role * E + e, mask=inside, other=0.0)
        p_b = tl.load(p_ifs + role * E + e, mask=inside, other=0.0)
        tl.store(dlogits + role * 2 * E + e, softmax_backward(da, p_a) * part, mask=inside)
        tl.store(dlogits + role * 2 * E + E + e, softmax_backward(db, p_b) * part, mask=inside)
    elif q is not None:
        slot, factor = (role - B) // E, (role - B) % E
        acc = tl.zeros([E_PAD], tl.float32)
        for b in range(B):
            if tl.load(index_a + b * R + slot) == factor:
                db = probability_gradient(
                    b, dgate, dprobs_b, index_b, probs_b, index_a, probs_a, E, R, E_PAD, R_PAD, WEIGHTED
                )
                dq = softmax_backward(db, tl.load(p_cfs + b * E + e, mask=inside, other=0.0))
                acc += softmax_backward(dq, tl.load(q + (b * R + slot) * E + e, mask=inside, other=0.0))
        tl.store(dtable + (slot * E + e) * E + factor, acc, mask=inside)


def fake_route_backward(dgate, dprobs_a, dprobs_b, index_a, index_b, probs_a, probs_b, p_ifs, p_cfs, q, share, gate):
    B, E = probs_a.shape
    r = index_a.shape[1]
    return probs_a.new_empty(B, 2 * E), probs_a.new_empty((0,) if q is None else (r, E, E))


def launch_route_backward(dgate, dprobs_a, dprobs_b, index_a, index_b, probs_a, probs_b, p_ifs, p_cfs, q, share, gate):
    outputs = fake_route_backward(
        dgate, dprobs_a, dprobs_b, index_a, index_b, probs_a, probs_b, p_ifs, p_cfs, q, share, gate
    )
    (B, E), r = probs_a.shape, index_a.shape[1]
    programs = B + (0 if q is None else r * E)
    given = (None if t is None else t.contiguous() for t in (dgate, dprobs_a, dprobs_b))
    launch(
        route_backward_kernel, (programs,), probs_a.device,
        *given, index_a, index_b, probs_a, probs_b, p_ifs, p_cfs, q, share, *outputs, B,
        E=E, R=r, E_PAD=triton.next_power_of_2(E), R_PAD=triton.next_power_of_2(r),
        WEIGHTED=gate == "weighted", num_warps=1,
    )  # fmt: skip
    return outputs


route_backward_op = register(
    "route_backward(Tensor? dgate, Tensor? dprobs_a, Tensor? dprobs_b, Tensor index_a, Tensor index_b, "
    "Tensor probs_a, Tensor probs_b, Tensor p_ifs, Tensor? p_cfs, Tensor? q, Tensor? share, str gate) "
    "-> (Tensor, Tensor)",
    launch_route_backward,
    fake_route_backward,
)
