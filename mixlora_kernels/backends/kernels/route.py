"""route: from the logits to the factors of each instance, in one launch, and the way back (``expand_gather_kernel``
takes it, with each instance's gate gradient in its registers).

Equations 6 to 8, one program for an instance of a sibling, everything in float32:

    p_A = softmax(logits_a)       index_a = top_r(p_A)       q_i = softmax(T[i, index_a[i]])
    p_CFS = softmax(Σ_i q_i)      p_IFS = softmax(logits_b)      p_B = p_IFS + p_CFS      index_b = top_r(p_B)

Tied pairs end with index_a. The logits and T come in slabs (pool.py), which are added up here. The backward returns the
gradient of the logits and that of the looked-up rows of T.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import Launch, plan


def gate_total(gate: str, r: int) -> float:
    """What an instance's gates add up to where they are shares; 0 where they are all 1."""
    return {"weighted": 1.0, "normalized": float(r)}.get(gate, 0.0)


def warps(E: int, r: int) -> int:
    """One, as long as a program's [R, E] fits its registers: it then sums without a barrier."""
    return 1 if tuning.power_of_2(E) * tuning.power_of_2(r) <= 1024 else 4


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


@triton.jit
def add_slabs(place, stride, slabs, inside, E_PAD: tl.constexpr, BLOCK_K: tl.constexpr):
    """Σ_k place[k · stride + e], [E_PAD]."""
    e = tl.arange(0, E_PAD)
    total = tl.zeros([BLOCK_K, E_PAD], tl.float32)
    for start in range(0, slabs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = (k < slabs)[:, None] & inside[None, :]
        total += tl.load(place + k[:, None].to(tl.int64) * stride + e[None, :], mask=there, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def top_r(p, inside, R: tl.constexpr, E_PAD: tl.constexpr, R_PAD: tl.constexpr):
    """The indices of the r largest, largest first [R_PAD], and their probabilities."""
    e, slots = tl.arange(0, E_PAD), tl.arange(0, R_PAD)
    index, chosen = tl.zeros([R_PAD], tl.int64), tl.zeros([R_PAD], tl.float32)
    left = by_rank(p, inside)
    for i in range(R):
        best = largest(left, e, E_PAD)
        left = tl.where(e == best, float("-inf"), left)
        index = tl.where(slots == i, best, index)
        chosen = tl.where(slots == i, tl.sum(tl.where(e == best, p, 0.0), 0), chosen)
    return index, chosen


@triton.jit(do_not_specialize=["B", "slabs", "splits"])
def route_kernel(
    logits, table, index_a, index_b, gate, probs_a, probs_b, kept, B, slabs, splits,
    G: tl.constexpr, E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr, R_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    b, g = tl.program_id(0), tl.program_id(1)
    e, slots = tl.arange(0, E_PAD), tl.arange(0, R_PAD)
    inside, there = e < E, slots < R
    row = (g * B + b).to(tl.int64)
    z_a = add_slabs(logits + (g * slabs * B + b).to(tl.int64) * E, B * E, slabs, inside, E_PAD, BLOCK_K)
    p_a = softmax(z_a, inside)
    chosen_a, weight = top_r(p_a, inside, R, E_PAD, R_PAD)
    tl.store(probs_a + row * E + e, p_a, mask=inside)
    tl.store(index_a + row * R + slots, chosen_a, mask=there)
    gates = tl.full([R_PAD], 1.0, tl.float32)
    if TOTAL > 0:
        gates = TOTAL * weight / tl.sum(weight, 0)
    if index_b is not None:
        z_b = add_slabs(logits + ((G + g) * slabs * B + b).to(tl.int64) * E, B * E, slabs, inside, E_PAD, BLOCK_K)
        p_b = softmax(z_b, inside)
        rows: tl.constexpr = 1 if table is None else 2 + R  # of ``kept``: p_IFS, p_CFS, q
        kept += row * rows * E
        tl.store(kept + e, p_b, mask=inside)
        if table is not None:
            said = tl.zeros([E_PAD], tl.float32)
            for i in range(R):
                best = tl.sum(tl.where(slots == i, chosen_a, 0), 0)
                place = table + ((g * splits * R + i) * E + best) * E
                q_i = softmax(add_slabs(place, R * E * E, splits, inside, E_PAD, BLOCK_K), inside)
                tl.store(kept + (2 + i) * E + e, q_i, mask=inside)
                said += q_i
            p_cfs = softmax(said, inside)
            tl.store(kept + E + e, p_cfs, mask=inside)
            p_b += p_cfs
        chosen_b, weight = top_r(p_b, inside, R, E_PAD, R_PAD)
        tl.store(probs_b + row * E + e, p_b, mask=inside)
        tl.store(index_b + row * R + slots, chosen_b, mask=there)
        if TOTAL > 0:
            gates *= TOTAL * weight / tl.sum(weight, 0)
    tl.store(gate + row * R + slots, gates, mask=there)


def allocate_routing(x: Tensor, pools: bool, G, B, E, r, unties: bool, conditioning: str) -> list[Tensor]:
    """index_a, gate, probs_a, pooled; where B chooses for itself, index_b, probs_b and what the backward needs; and
    the row sums of published conditioning."""
    real, index = {"dtype": torch.float32}, {"dtype": torch.int64}
    outputs = [
        x.new_empty(G, B, r, **index), x.new_empty(G, B, r, **real), x.new_empty(G, B, E, **real),
        x.new_empty(B if pools else 0, x.shape[1], **real),
    ]  # fmt: skip
    if unties:
        rows = 1 if conditioning == "none" else 2 + r
        outputs += (x.new_empty(G, B, r, **index), x.new_empty(G, B, E, **real), x.new_empty(G, B, rows, E, **real))
    if unties and conditioning == "published":
        outputs.append(x.new_empty(G, r, 2, E, **real))
    return outputs


@plan
def plan_route(shape, R, splits, total) -> Launch:
    """The launch for logits in slabs of this shape, and T in so many ``splits``, 0 without T."""
    _, G, slabs, B, E = shape
    return Launch(
        route_kernel, (B, G), {"num_warps": warps(E, R)},
        B=B, slabs=slabs, splits=splits, G=G, E=E, R=R, E_PAD=tuning.power_of_2(E), R_PAD=tuning.power_of_2(R),
        BLOCK_K=16, TOTAL=total,
    )  # fmt: skip


@triton.jit
def probability_gradient(
    row, dchosen, dprobs, index, probs, other_index, other_probs,
    E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr, R_PAD: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """The gradient of one pool's probabilities [E_PAD]: as the gate's, in the chosen ones, and as they are returned."""
    e, slots = tl.arange(0, E_PAD), tl.arange(0, R_PAD)
    there = slots < R
    chosen = tl.load(index + row * R + slots, mask=there, other=-1)
    if TOTAL > 0:  # gate = share · other's share, share = TOTAL · p / Σ p over the chosen
        p = tl.load(probs + row * E + chosen, mask=there, other=0.0)
        if other_index is not None:
            other = tl.load(other_index + row * R + slots, mask=there, other=0)
            other_p = tl.load(other_probs + row * E + other, mask=there, other=0.0)
            dchosen *= TOTAL * other_p / tl.sum(other_p, 0)
        sum_p = tl.sum(p, 0)
        dchosen = TOTAL * (dchosen - tl.sum(dchosen * p, 0) / sum_p) / sum_p
    dp = tl.sum(tl.where(chosen[:, None] == e[None, :], dchosen[:, None], 0.0), 0)
    if dprobs is not None:
        dp += tl.load(dprobs + row * E + e, mask=e < E, other=0.0)
    return dp


@triton.jit
def route_backward(
    dchosen, dprobs_a, dprobs_b, index_a, index_b, probs_a, probs_b, kept, dlogits, dlooked, row, B,
    G: tl.constexpr, E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr, R_PAD: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """From an instance's dgate, ``dchosen`` [R_PAD], and the gradients of its probabilities to those of its logits
    [1 or 2, G, B, E] and of the rows of T that it looked up [G, B, R, E]. ``row`` counts instances of all siblings."""
    e = tl.arange(0, E_PAD)
    inside = e < E
    row = row.to(tl.int64)
    dp = probability_gradient(
        row, dchosen, dprobs_a, index_a, probs_a, index_b, probs_b, E, R, E_PAD, R_PAD, TOTAL
    )  # fmt: skip
    p = tl.load(probs_a + row * E + e, mask=inside, other=0.0)
    tl.store(dlogits + row * E + e, softmax_backward(dp, p), mask=inside)
    if index_b is not None:
        dp = probability_gradient(
            row, dchosen, dprobs_b, index_b, probs_b, index_a, probs_a, E, R, E_PAD, R_PAD, TOTAL
        )  # fmt: skip
        rows: tl.constexpr = 1 if dlooked is None else 2 + R
        kept += row * rows * E
        p = tl.load(kept + e, mask=inside, other=0.0)
        tl.store(dlogits + (G * B + row) * E + e, softmax_backward(dp, p), mask=inside)
        if dlooked is not None:
            dq = softmax_backward(dp, tl.load(kept + E + e, mask=inside, other=0.0))
            for i in range(R):
                q_i = tl.load(kept + (2 + i) * E + e, mask=inside, other=0.0)
                tl.store(dlooked + (row * R + i) * E + e, softmax_backward(dq, q_i), mask=inside)
