"""The paper, equation by equation, in plain torch. Tests compare every other implementation with this one.

Read it beside "Multimodal Instruction Tuning with Conditional Mixture of LoRA" (ACL 2024). Each function computes one
equation for one instance, in any floating dtype. Autograd computes the gradients. It imports nothing of this package.

Shapes: h [L, d_in] hidden states of one instance, lora_A [E, d_in], lora_B [E, d_out], router_A and router_B
[E, d_route], router_AB [r, E, d_in]; d_route is d_in, or the width of the task embedding.
"""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor


def average(h: Tensor, mask: Tensor | None = None) -> Tensor:
    """Equation 5, or Equation 10 for a task embedding h: the mean of the tokens in ``mask``, [L, d] -> [d]."""
    if mask is not None:
        h = h[mask.bool()]
    return h.mean(dim=0)


def top_r(p: Tensor, r: int) -> Tensor:
    """The indices of the r largest entries of p [E], largest first. Of equal entries the lower index comes first."""
    return torch.sort(p, descending=True, stable=True).indices[:r]


def select_a(pooled: Tensor, router_A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Equation 6: the probabilities p_A [E] and the factors chosen for A, [r]."""
    p_a = torch.softmax(router_A @ pooled, dim=-1)
    return p_a, top_r(p_a, r)


def conditional(A: Tensor, router_AB: Tensor) -> Tensor:
    """Equation 7: the logits of B's factors, [E], from the chosen factors A [r, d_in]."""
    return reduce(torch.add, (torch.softmax(router_AB[i] @ A[i], dim=-1) for i in range(len(A))))


def conditional_published(A: Tensor, router_AB: Tensor) -> Tensor:
    """Equation 7 as the released code computes it: 'rd,rfe->re' sums over d and over f separately, and multiplies."""
    return reduce(torch.add, (torch.softmax(A[i].sum() * router_AB[i].sum(dim=-1), dim=-1) for i in range(len(A))))


def select_b(pooled: Tensor, router_B: Tensor, r: int, r_cfs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Equation 8: p_IFS + p_CFS [E] and the factors chosen for B, [r]; ``r_cfs`` is Equation 7's result."""
    p_b = torch.softmax(router_B @ pooled, dim=-1)
    if r_cfs is not None:
        p_b = p_b + torch.softmax(r_cfs, dim=-1)
    return p_b, top_r(p_b, r)


def gates(kind: str, *probabilities: Tensor) -> Tensor:
    """The gate of each of the r pairs, [r], from the probabilities of the chosen factors, [r] each: A's and B's, or A's
    alone if pairs are tied."""
    if kind == "binary":  # g[i] = 1 below Equation 6
        return torch.ones_like(probabilities[0])
    if kind == "straight_through":  # the same 1, through which the routers learn
        return 1 + reduce(torch.add, (p - p.detach() for p in probabilities))
    if kind == "weighted":
        return reduce(torch.mul, (p / p.sum() for p in probabilities))
    if kind == "normalized":  # a mean of 1 over the r chosen
        return reduce(torch.mul, (len(p) * p / p.sum() for p in probabilities))
    raise ValueError(f"unknown gate {kind!r}")


def update(h: Tensor, A: Tensor, B: Tensor, gate: Tensor) -> Tensor:
    """Equations 4 and 9: sum_i gate_i b_i (a_i . h) for each token of h, [L, d_in] -> [L, d_out]."""
    return (h @ A.T) * gate @ B


def route(
    pooled: Tensor, lora_A: Tensor, router_A: Tensor, router_B: Tensor | None, router_AB: Tensor | None, *,
    r: int, conditioning: str = "factors", gate: str = "straight_through",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Section 4.1 for one instance, from its pooled states [d_route].

    Returns ``index_a, index_b`` [r], ``gate`` [r], and ``p_a, p_b`` [E].
    """
    p_a, index_a = select_a(pooled, router_A, r)
    if conditioning == "tied":  # the pair (a_e, b_e) is chosen as one
        return index_a, index_a, gates(gate, p_a[index_a]), p_a, p_a
    equations: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
        "none": None, "factors": conditional, "published": conditional_published,
    }  # fmt: skip
    equation_7 = equations[conditioning]
    r_cfs = None if equation_7 is None else equation_7(lora_A[index_a], _needed(router_AB, "router_AB", conditioning))
    p_b, index_b = select_b(pooled, _needed(router_B, "router_B", conditioning), r, r_cfs)
    return index_a, index_b, gates(gate, p_a[index_a], p_b[index_b]), p_a, p_b


def _needed(router: Tensor | None, name: str, conditioning: str) -> Tensor:
    if router is None:
        raise ValueError(f"routing with conditioning={conditioning!r} needs {name}, got None")
    return router


def mixlora(
    h: Tensor, frozen: Tensor, lora_A: Tensor, lora_B: Tensor, router_A: Tensor | None = None,
    router_B: Tensor | None = None, router_AB: Tensor | None = None, *, r: int, scaling: float,
    conditioning: str = "factors", gate: str = "straight_through", mask: Tensor | None = None,
    task: Tensor | None = None, task_mask: Tensor | None = None,
    chosen: tuple[Tensor, Tensor, Tensor] | None = None, dropped: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:  # fmt: skip
    """Equation 1 with the update of Equation 9, for one instance.

    Args:
        h: hidden states [L, d_in].
        frozen: ``W h`` (and bias), [L, d_out], in any floating dtype.
        mask: tokens that Equation 5 averages over, [L]; None means all.
        task: task embedding [T, d_task] to route by instead of h (Appendix A); ``task_mask`` [T] likewise.
        chosen: ``(index_a, index_b, gate)`` to use; None: route.
        dropped: A's input after dropout, [L, d_in]; None means h.

    Returns:
        y [L, d_out] in frozen's dtype, and ``(index_a, index_b, gate, p_a, p_b)``. p_a and p_b are None if ``chosen``
        is given.
    """
    # Routing is computed in float32 or float64: in half precision, ties at the border of the top r are common.
    precise = torch.promote_types(h.dtype, torch.float32)
    routing: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
    if chosen is not None:
        routing = (*chosen, None, None)
    else:
        read, pooled_tokens = (h, mask) if task is None else (task, task_mask)
        pooled = average(read.to(precise), pooled_tokens)
        routers = [None if p is None else p.to(precise) for p in (router_A, router_B, router_AB)]
        a = _needed(routers[0], "router_A", conditioning)
        routing = route(pooled, lora_A.to(precise), a, *routers[1:], r=r, conditioning=conditioning, gate=gate)
    index_a, index_b, weight = routing[:3]
    A, B = lora_A[index_a].to(h.dtype), lora_B[index_b].to(h.dtype)
    delta = scaling * update(h if dropped is None else dropped, A, B, weight.to(h.dtype))
    return (frozen + delta).to(frozen.dtype), routing
