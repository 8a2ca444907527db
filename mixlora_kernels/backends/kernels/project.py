"""project: u = drop(x) · lora_Aᵀ for the pools of all siblings, and the sums over pooled tokens (Equation 5), in one
pass over x; then the choice of factors (pool.py, route.py).

    u[g, t] = lora_A[g] · drop_g(x[t])            sums[tile] = Σ_t pooled_t x[t]

The sums are exact: float32 sums of x's own values, taken once for all siblings. u is kept for the whole pool, because
the choice comes after it; ``expand`` picks the chosen columns.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dropout import dropped_levels
from ...routing import Routing
from ..base import Group, Saved
from . import tuning
from .dropout import keep_tile
from .launch import Launch, Op, as_pools, as_rows, plan
from .pool import plan_pool
from .product import dot, dot_precision
from .route import allocate_routing, gate_total, plan_route
from .tiles import count_tiles, find_rows, padded_count, row_tile


def project(group: Group) -> tuple[Routing, Saved]:
    """``Stages.project``; it leaves u [G, S, N, E] float32, S planes to be added up, before the scale 1 / (1 - p); the
    pooled mean or what the routers read [B, d_route]; what ``route`` kept; and the sums of published conditioning."""
    instances, options, routes = group.instances, group.options, group.given is None
    lora_A, *routers = zip(*((own.lora_A, own.router_A, own.router_B, own.router_AB) for own in group.factors))
    router_A, router_B, router_AB = ([t for t in own if t is not None and routes] for own in routers)
    u, *routed = PROJECT.on(group.x)(
        group.x, lora_A, router_A, router_B, router_AB, group.read, instances.cu_seqlens, instances.mask,
        instances.mean_weights, group.seeds, instances.count, instances.length or 0,
        dropped_levels(options.p), options.r, options.gate,
        options.conditioning or "none", routes,
    )  # fmt: skip
    if not routes:
        return group.given, (u, None, None, None)
    index_a, gate, probs_a, pooled, *routed = routed
    pooled = pooled if group.read is None else group.read
    if options.tied:
        return Routing(index_a, index_a, gate, probs_a, probs_a), (u, pooled, None, None)
    index_b, probs_b, kept, *row_sums = routed
    return Routing(index_a, index_b, gate, probs_a, probs_b), (u, pooled, kept, row_sums[0] if row_sums else None)


@triton.jit(do_not_specialize=["B", "L", "N", "dropped"])
def project_kernel(
    x, pools, cu_seqlens, mask, seeds, u, sums, B, L, N, D, stride_x, span, splits, dropped,
    G: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, B_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, split = row_tile(), tl.program_id(1)
    _, first, end = find_rows(tile, cu_seqlens, B, L, BLOCK_N, B_PAD)
    rows = first + tl.arange(0, BLOCK_N).to(tl.int64)
    live = rows < end
    factors = tl.arange(0, E_PAD)
    pooled = live
    if mask is not None:
        pooled = tl.load(mask + rows, mask=live, other=0) != 0
    products = ()
    for _ in tl.static_range(G):
        products = products + (tl.zeros([BLOCK_N, E_PAD], tl.float32),)
    for start in range(split * span, min(split * span + span, D), BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < D
        x_tile = tl.load(x + rows[:, None] * stride_x + d[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if sums is not None:
            read = x_tile.to(tl.float32)
            if mask is not None:  # chosen, not multiplied by 0: what stands in the padding may be infinite
                read = tl.where(pooled[:, None], read, 0.0)
            tl.store(sums + tile.to(tl.int64) * D + d, tl.sum(read, 0), mask=inside)
        added = ()
        for g in tl.static_range(G):
            a_tile = tl.load(
                pools[g] + factors[:, None] * D + d[None, :], mask=(factors < E)[:, None] & inside[None, :], other=0.0
            )  # [E_PAD, BLOCK_D]
            dropped_tile = x_tile
            if seeds is not None:
                dropped_tile = tl.where(keep_tile(seeds + g, rows, start, dropped, BLOCK_N, BLOCK_D), x_tile, 0.0)
            added = added + (dot(dropped_tile, tl.trans(a_tile.to(x_tile.dtype)), products[g], PRECISION),)
        products = added
    there = live[:, None] & (factors < E)[None, :]
    for g in tl.static_range(G):
        plane = (g * splits + split).to(tl.int64) * N
        tl.store(u + (plane + rows[:, None]) * E + factors[None, :], products[g], mask=there)


def divide_columns(arch: str, N, D: int, E: int, itemsize: int):
    """The tile, and into how many splits of which span the columns are divided. It does not depend on the number of
    siblings, so that the bits of each do not."""
    tile = tuning.project(arch, N, D, tuning.pad(E), itemsize)
    span = tile.span or tuning.divide(D, tile.columns) * tile.columns
    return tile, span, tuning.divide(D, span)


@plan
def plan_project(
    arch, itemsize, N, D, stride_x, E, G, packed, B, L, dropped, precision
) -> tuple[list[tuple[slice, Launch]], int, int]:  # fmt: skip
    """The launches, each with the siblings that it serves; the tiles, and a tile's rows."""
    tile, span, splits = divide_columns(arch, N, D, E, itemsize)
    tiles, together = count_tiles(N, B, L, packed, tile.rows), tuning.siblings(tuning.pad(E))
    launches = []
    for g in range(0, G, together):
        launch = Launch(
            project_kernel, (tiles, splits), tile.options,
            B=B, L=L, N=N, D=D, stride_x=stride_x, span=span, splits=splits, dropped=dropped,
            G=min(together, G - g), E=E, E_PAD=tuning.pad(E), B_PAD=padded_count(B, packed),
            BLOCK_N=tile.rows, BLOCK_D=tile.columns, PRECISION=precision,
        )  # fmt: skip
        launches.append((slice(g, g + together), launch))
    return launches, tiles, tile.rows


def allocate_project(
    x: Tensor, lora_A: Sequence[Tensor], router_A: Sequence[Tensor], router_B: Sequence[Tensor],
    router_AB: Sequence[Tensor], read: Tensor | None, cu_seqlens: Tensor | None, mask: Tensor | None,
    mean_weights: Tensor | None, seeds: Tensor | None, B: int, L: int, dropped: int, r: int, gate: str,
    conditioning: str, routes: bool,
) -> list[Tensor]:  # fmt: skip
    """u; and, where factors are chosen, index_a, gate, probs_a, the pooled mean; index_b, probs_b, what ``route``
    keeps; and the row sums of published conditioning, as far as there are any."""
    G, E = len(lora_A), lora_A[0].shape[0]
    _, _, splits = divide_columns(tuning.architecture(x.device), *x.shape, E, x.element_size())
    outputs = [x.new_empty(G, splits, x.shape[0], E, dtype=torch.float32)]
    if routes:
        outputs += allocate_routing(x, read is None, G, B, E, r, bool(router_B), conditioning)
    return outputs


def run_project(
    x, lora_A, router_A, router_B, router_AB, read, cu_seqlens, mask, mean_weights, seeds, B, L,
    dropped, r, gate, conditioning, routes,
):  # fmt: skip
    outputs = allocate_project(
        x, lora_A, router_A, router_B, router_AB, read, cu_seqlens, mask, mean_weights, seeds, B, L,
        dropped, r, gate, conditioning, routes,
    )  # fmt: skip
    u, *routed = outputs
    arch, device, packed = tuning.architecture(x.device), x.device, cu_seqlens is not None
    x, pools, (N, D), E = as_rows(x), as_pools(lora_A), x.shape, lora_A[0].shape[0]
    launches, tiles, rows = plan_project(
        arch, x.element_size(), N, D, x.stride(0), E, len(pools), packed, B, L, dropped, dot_precision()
    )
    sums = x.new_empty(tiles, D, dtype=torch.float32) if routes and read is None else None
    for members, launch in launches:
        first, several = members.start == 0, len(launches) > 1
        launch(
            device, x=x, pools=pools[members], cu_seqlens=cu_seqlens, mask=mask if sums is not None else None,
            seeds=seeds[members] if several and seeds is not None else seeds,
            u=u[members] if several else u, sums=sums if first else None,
        )  # fmt: skip
    if not routes:
        return outputs

    index_a, weight, probs_a, pooled, *untied = routed
    index_b, probs_b, kept, row_sums = (*untied, None, None, None, None)[:4]
    router_A, router_B, router_AB = (as_pools(own) if own else None for own in (router_A, router_B, router_AB))
    pool, logits_shape, table_shape = plan_pool(
        arch, router_A[0].shape, len(pools), router_B is not None, router_AB and router_AB[0].shape,
        conditioning == "published", 1.0 / (L or 1), rows, packed, B, L,
    )  # fmt: skip
    logits = u.new_empty(logits_shape)
    table = u.new_empty(table_shape) if router_AB else None
    pool(
        device, sums=sums, read=read, mean_weights=mean_weights, cu_seqlens=cu_seqlens, router_A=router_A,
        router_B=router_B, pooled=pooled, logits=logits, lora_A=pools if router_AB else None, router_AB=router_AB,
        table=table, row_sums=row_sums,
    )  # fmt: skip
    route = plan_route(logits_shape, r, table_shape[1] if router_AB else 0, gate_total(gate, r))
    route(
        device, logits=logits, table=table, index_a=index_a, index_b=index_b, gate=weight, probs_a=probs_a,
        probs_b=probs_b, kept=kept,
    )  # fmt: skip
    return outputs


PROJECT = Op("project", run_project, allocate_project)
