"""The operation as stages, each a backend's own, one after the other.

A backend with stages offers ``project`` (x to the pool's products and the routers' logits), ``route`` (logits to the
choice of factors, with ``condition_table``) and ``expand`` (the chosen products into y), each with its backward. What
one stage hands to the next is the backend's own affair.
"""

from types import ModuleType

import torch
from torch import Tensor

from ..routing import Instances
from .contract import Factors, Needs, Options


def forward(
    stages: ModuleType, y: Tensor, x: Tensor, factors: Factors, pooled: Tensor | None,
    given: tuple[Tensor, Tensor, Tensor] | None, seed: Tensor | None, instances: Instances, options: Options,
    in_place: bool,
):  # fmt: skip
    """Add the update to y.

    Args:
        y: the frozen map's output [N, d_out]. in_place: whether it may be changed.
        x: the tokens [N, d_in].
        pooled: what the routers read, [B, d_route], where that is not x.
        given: ``index_a``, ``index_b`` and ``gate`` to use; None: they are to be chosen.
        seed: dropout's, or None.

    Returns:
        y; ``index_a, index_b, gate, probs_a, probs_b`` as in ``Routing`` (the last two None where they were given); and
        the state, tensors for the backward.
    """
    precise = torch.promote_types(options.dtype, torch.float32)
    lora_A, lora_B, router_A, router_B, router_AB = factors
    routers = join_routers(router_A, router_B, precise) if given is None else None  # [2E, d_route], tied [E, d_route]
    u, logits, mean = stages.project(x, lora_A, routers if options.pools else None, instances, seed, options.p)
    if given is None:
        logits = logits if options.pools else pooled @ routers.T  # [B, 2E]
        table = None
        if options.conditioning is not None:
            table = stages.condition_table(lora_A.to(precise), router_AB.to(precise), options.conditioning)
        *routing, saved = stages.route(logits, table, options.r, options.gate, instances, options.tied)
    else:
        routing, saved = (*given, None, None), ()
    index_a, index_b, gate, *_ = routing
    y, chosen, s, weight = stages.expand(y, u, lora_B, index_a, index_b, gate, options.scale, instances, in_place)
    return y, routing, (mean, chosen, s, weight, *saved)


def backward(
    stages: ModuleType, dy: Tensor, dx: Tensor | None, drouting: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor | None, factors: Factors, pooled: Tensor | None, seed: Tensor | None, routing, state,
    instances: Instances, options: Options, needs: Needs,
):  # fmt: skip
    """The gradients from that of y, dy [N, d_out], and those of the gate and the probabilities, ``drouting``.

    Args:
        dx: x's gradient through the frozen map, to which the adapter's is added in place; None: there is none.
        x: None where neither lora_A nor a router has a gradient.
        The others as in ``forward``, or its results.

    Returns:
        Those of x, of the factors, of what the routers read, and of the gate; None where not needed.
    """
    precise = torch.promote_types(options.dtype, torch.float32)
    (lora_A, lora_B, router_A, router_B, router_AB), (dgate, dprobs_a, dprobs_b) = factors, drouting
    (index_a, index_b, _, probs_a, probs_b), (mean, chosen, s, weight, *saved) = routing, state
    du, dlora_B, dgate_y = stages.expand_backward(
        dy, chosen, s, lora_B, index_a, index_b, weight, options.scale, instances, needs.lora_B, needs.gate
    )
    if dgate_y is not None:
        dgate = dgate_y if dgate is None else dgate_y + dgate

    dlogits = routers = drouters = dpooled = dlora_A_table = drouter_AB = None
    if needs.routers:
        dlogits, dtable = stages.route_backward(
            dgate, dprobs_a, dprobs_b, index_a, index_b, probs_a, probs_b, saved, options.gate
        )
        routers = join_routers(router_A, router_B, precise)
        if dtable is not None:
            dlora_A_table, drouter_AB = stages.condition_table_backward(
                dtable, lora_A.to(precise), router_AB.to(precise), options.conditioning
            )
        if not options.pools:
            drouters, dpooled = dlogits.T @ pooled, dlogits @ routers

    read = (dlogits, routers, mean) if options.pools else (None, None, None)
    dx, dlora_A, drouters_read = stages.project_backward(
        dx, x, du.to(options.dtype), lora_A, index_a, *read, instances, seed, options.p, needs.x, needs.lora_A
    )
    if dlora_A is not None and dlora_A_table is not None:
        dlora_A = dlora_A.to(lora_A.dtype).add_(dlora_A_table)
    drouters = drouters if drouters_read is None else drouters_read
    drouter_A, drouter_B = (None, None) if drouters is None else (drouters, None) if options.tied else drouters.chunk(2)
    return dx, Factors(dlora_A, dlora_B, drouter_A, drouter_B, drouter_AB), dpooled, dgate


def join_routers(router_A: Tensor, router_B: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The routers of a layer as one matrix, which is A's alone where pairs are tied."""
    return (router_A if router_B is None else torch.cat((router_A, router_B))).to(dtype)
