"""expand: y += s · lora_B, where s[t, index_b[i]] = weight_i · u[t, index_a[i]], and back.

The permutation is per instance and moves r numbers of E; the product is one for all instances.
"""

import torch
from torch import Tensor

from ...routing import Instances


def expand(y: Tensor, u, lora_B, index_a, index_b, gate, scale: float, instances: Instances, in_place: bool):
    """Add the update to y [N, d_out], in place or not; gate is [B, r].

    Returns y, and for the backward the chosen products [N, r], s [N, E] and weight = scale · gate.
    """
    weight = gate * scale
    chosen = instances.by_token(u).gather(-1, instances.expand(index_a))
    s = _place(chosen, index_b, weight, u, instances)
    lora_B = lora_B.to(y.dtype)
    s = s.to(y.dtype)
    # A compiler decides itself what to reuse; torch 2.11's, given addmm_, returns gradients of zero without a word.
    if in_place and not torch.compiler.is_compiling():
        return y.addmm_(s, lora_B), chosen, s, weight
    return torch.addmm(y, s, lora_B), chosen, s, weight


def expand_backward(
    dy: Tensor, chosen, s, lora_B, index_a, index_b, weight, scale: float, instances: Instances, need_B, need_gate
):
    """The gradients of u [N, E], lora_B [E, d_out] and the gate [B, r] from that of y; None where not needed."""
    v = dy @ lora_B.to(dy.dtype).T  # [N, E]
    paired = instances.by_token(v).gather(-1, instances.expand(index_b))
    du = _place(paired, index_a, weight, v, instances)
    dlora_B = s.T @ dy if need_B else None
    dgate = instances.sum(chosen * paired, weight.dtype) * scale if need_gate else None
    return du, dlora_B, dgate


def _place(chosen: Tensor, target: Tensor, weight: Tensor, like: Tensor, instances: Instances) -> Tensor:
    """Zeros [N, E] with weight_i · chosen[t, i] at target_i. The product is taken in the weight's precision, so
    that no rounding of the weight biases a whole instance."""
    placed = torch.zeros_like(like)
    moved = (chosen * instances.expand(weight)).to(like.dtype)
    instances.by_token(placed).scatter_(-1, instances.expand(target), moved)
    return placed
