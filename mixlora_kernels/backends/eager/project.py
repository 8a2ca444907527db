"""project: choose the factors, then compute u = drop(x) · lora_Aᵀ for the chosen rows; and its backward.

The routers multiply the mean of an instance's tokens (Equation 5). This backend computes the mean first, and the logits
from it. That reads x once more, which costs less than a product of all tokens with the routers, and the mean is float32
even if x is not.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...routing import Instances, Routing, can_look, running_dtype
from ..base import Gradients, Group, Needs, Saved
from .dropout import project_dropped, project_dropped_backward
from .rank_r import add, choose_rows, collect, pick, products
from .route import required, route, route_backward

BLOCK = 128  # tokens that are converted, or get a copy of their instance's gradient, at a time


def project(group: Group) -> tuple[Routing, Saved]:
    """``Stages.project``. For later stages it returns u [N, G * R] without the scale 1 / (1 - p), the routers' input
    [B, d_route], and what ``route`` saved."""
    x, instances, options = group.x, group.instances, group.options
    routing, read = group.given, group.read
    kept: Saved = ()
    if routing is None:
        if options.reads_x:
            read = mean(x, instances, options.precise)
        routing, kept = route(required(read, "read"), group.factors, options)
    us = []
    for g, factors in enumerate(group.factors):
        chosen = choose_rows([factors.lora_A], routing.index_a[g : g + 1], instances, x.dtype)
        if group.seeds is None:
            us.append(products(x, chosen))
        else:
            whole = project_dropped(x, chosen.pool, group.seeds[g : g + 1], options.p)
            us.append(pick(whole, chosen))
    u = us[0] if len(us) == 1 else torch.cat(us, -1)
    return routing, (u, read, *kept)


def project_backward(
    group: Group, dx: Tensor | None, routing: Routing, saved: Saved, carried: Saved, needs: Needs
) -> Gradients:
    """``Stages.project_backward``."""
    x, instances, options, G = group.x, group.instances, group.options, len(group.factors)
    read, kept, (du, dgate, dprobs_a, dprobs_b) = saved[1], saved[2:], carried
    nothing: list[Tensor | None] = [None] * G
    dlora_A: Sequence[Tensor] = ()
    pools = [factors.lora_A for factors in group.factors]
    chosen = choose_rows(pools, routing.index_a, instances, du.dtype)
    if needs.x and dx is None:
        dx = du.new_zeros(len(du), chosen.pool.shape[1])
    if group.seeds is None:
        if dx is not None and needs.x:
            dx = add(dx, du, chosen)
        if needs.lora_A:
            dlora_A = collect(du, x, chosen).chunk(G)
    elif needs.x or needs.lora_A:
        parts = chosen.pool.chunk(G), chosen.place(du).chunk(G, -1), group.seeds.split(1)
        gradients = [
            project_dropped_backward(dx if needs.x else None, x if needs.lora_A else None, du_g, pool, seed, options.p)
            for pool, du_g, seed in zip(*parts)
        ]
        dlora_A = gradients if needs.lora_A else ()
    if not needs.routers:
        return Gradients(dx, dlora_A or nothing, nothing, nothing, nothing, None)
    routers = route_backward((dgate, dprobs_a, dprobs_b), read, group.factors, routing, kept, options)
    if routers.lora_A is not None:
        dlora_A = [d.to(table.dtype).add_(table) for d, table in zip(dlora_A, routers.lora_A)]
    if options.reads_x and dx is not None:
        _mean_backward(dx, routers.read, instances)
    return Gradients(
        dx, dlora_A or nothing, routers.router_A, routers.router_B or nothing, routers.router_AB or nothing,
        None if options.reads_x else routers.read,
    )  # fmt: skip


def mean(x: Tensor, instances: Instances, dtype: torch.dtype) -> Tensor:
    """Equation 5, the mean over each instance's tokens: x [N, D] -> [B, D] in ``dtype``."""
    mask, look = instances.mask, can_look(x)
    # Sum x directly if that makes no copy. On a CPU, a sum in another dtype first converts all of x.
    if mask is None and instances.length is not None and (x.dtype == dtype or not look):
        return instances.by_token(x).sum(dim=1, dtype=dtype) * instances.mean_weight()
    total = x.new_zeros(instances.count, x.shape[1], dtype=running_dtype(dtype, x.device) if look else dtype)
    instance = instances.instance_of_token(x.device)
    for rows in _blocks(x):
        part = x[rows].to(dtype)
        if mask is not None and not (look and mask[rows].all()):
            # Not multiplied by 0, because padding may hold infinite values.
            part = part.masked_fill(~mask[rows, None], 0)
        if look:  # a block's sums first: one running sum of all tokens would add up their rounding errors
            first, last = instance[rows][[0, -1]].tolist()
            sums = part.new_zeros(last - first + 1, part.shape[1]).index_add_(0, instance[rows] - first, part)
            total[first : last + 1] += sums
        else:
            total.index_add_(0, instance[rows], part)
    return total.to(dtype) * instances.mean_weight()


def _mean_backward(dx: Tensor, dpooled: Tensor, instances: Instances) -> None:
    """Add the gradient of each instance's mean, [B, D], to the gradients dx of the tokens it runs over, in place."""
    dpooled, mask = (dpooled * instances.mean_weight()).to(dx.dtype), instances.mask
    if mask is None and instances.length is not None:
        instances.by_token(dx).add_(dpooled.unsqueeze(1))
        return
    # Looked up, not multiplied by 0 or 1: another instance's gradient may be infinite. A masked token looks up zeros.
    token = instances.instance_of_token(dx.device)
    if mask is not None:
        dpooled = torch.cat((dpooled, dpooled.new_zeros(1, dpooled.shape[1])))
        token = token.masked_fill(~mask, instances.count)
    for rows in _blocks(dx):
        dx[rows] += dpooled.index_select(0, token[rows])


def _blocks(x: Tensor) -> Iterator[slice]:
    """The rows of x [N, D], BLOCK at a time on a CPU. Elsewhere all at once: blocks would be a launch each, and a
    compiled graph makes no copy."""
    N = x.shape[0]
    block = BLOCK if can_look(x) else max(N, 1)
    return (slice(first, first + block) for first in range(0, N, block))
