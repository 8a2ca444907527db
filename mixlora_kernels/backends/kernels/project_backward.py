"""project's backward: the routers (routers_backward.py), the walk over x and dx (walk.py), and then lora_A's gradient
from what the chunks of the walk left:

    dlora_A[g][index_a[i]] += Σ_chunks parts[g, chunk, i]           + Σ_i dT[g, i]ᵀ · router_AB[g, i]
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dropout import dropped_levels
from ...routing import Routing
from ..base import Gradients, Group, Needs, Saved
from . import tuning
from .gather import gather_by_factor
from .launch import Launch, Op, as_pools, as_rows, plan
from .routers_backward import launch_routers_backward
from .siblings import member
from .walk import launch_walk


def project_backward(
    group: Group, dx: Tensor | None, routing: Routing, saved: Saved, carried: Saved, needs: Needs
) -> Gradients:
    """``Stages.project_backward``; ``carried`` is what ``expand_backward`` says."""
    x, instances, options, G = group.x, group.instances, group.options, len(group.factors)
    (_, pooled, _, row_sums), (du, dlogits, dlooked) = saved, carried
    overwrite = dx is None
    if needs.x and overwrite:
        dx = du.new_empty(du.shape[1], group.factors[0].lora_A.shape[1], dtype=options.dtype)
    lora_A, *routers = zip(*((own.lora_A, own.router_A, own.router_B, own.router_AB) for own in group.factors))
    routers = [[t for t in own if t is not None and needs.routers] for own in routers]
    router_A, router_B, router_AB = routers
    outs = [torch.empty_like(pooled)] if needs.routers and not options.reads_x else []
    for tensors in (lora_A if needs.lora_A else (), router_A + router_B, router_AB):
        outs += [torch.empty_like(own) for own in as_pools(tensors)]
    PROJECT_BACKWARD.on(du)(
        outs, dx if needs.x else None, x if needs.lora_A else None, du, lora_A, *routers, pooled, dlogits, dlooked,
        routing.index_a, row_sums, instances.cu_seqlens, instances.mask, instances.mean_weights, group.seeds,
        instances.count, instances.length or 0, dropped_levels(options.p), options.reads_x, overwrite, needs.lora_A,
    )  # fmt: skip
    taken, nothing = iter(outs), [None] * G
    dread = next(taken) if needs.routers and not options.reads_x else None
    there = (needs.lora_A, *map(bool, routers))
    dlora_A, drouter_A, drouter_B, drouter_AB = ([next(taken) for _ in range(G)] if t else nothing for t in there)
    return Gradients(dx, dlora_A, drouter_A, drouter_B, drouter_AB, dread)


@triton.jit(do_not_specialize=["chunks", "B", "L"])
def project_gather_kernel(
    parts, owner, index, dtable, row_sums, router_AB, dlora_A, chunks, B, L, D,
    G: tl.constexpr, E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A column block of one sibling's dlora_A."""
    g = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    e, inside = tl.arange(0, E_PAD), d < D
    own = g.to(tl.int64)
    acc = gather_by_factor(
        parts + own * chunks * R * D, D, owner, index + own * B * R, None, 1.0, chunks, L, d, inside,
        R, E_PAD, CHUNK, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    tile = (e < E)[:, None] & inside[None, :]
    if dtable is not None:
        for k in range(0, R * E, BLOCK_E):  # a slot and a factor of B each
            slot_e = k + tl.arange(0, BLOCK_E)
            there = slot_e < R * E
            place = dtable + (own * R * E + slot_e[None, :]) * E + e[:, None]  # turned: [f, (i, e)]
            turned = tl.load(place, mask=(e < E)[:, None] & there[None, :], other=0.0)
            rows = there[:, None] & inside[None, :]
            if row_sums is None:
                place = member(router_AB, g, G) + slot_e[:, None].to(tl.int64) * D + d[None, :]
                ab_tile = tl.load(place, mask=rows, other=0.0).to(tl.float32)
            else:
                place = row_sums + ((own * R + slot_e // E) * 2 + 1) * E + slot_e % E
                ab_tile = tl.where(rows, tl.load(place, mask=there, other=0.0)[:, None], 0.0)
            acc = tl.dot(turned, ab_tile, acc, input_precision="ieee")
    tl.store(member(dlora_A, g, G) + e[:, None] * D + d[None, :], acc, mask=tile)


def allocate_project_backward(
    outs: Sequence[Tensor], dx: Tensor | None, x: Tensor | None, du: Tensor, lora_A: Sequence[Tensor],
    router_A: Sequence[Tensor], router_B: Sequence[Tensor], router_AB: Sequence[Tensor], pooled: Tensor | None,
    dlogits: Tensor | None, dlooked: Tensor | None, index_a: Tensor, row_sums: Tensor | None,
    cu_seqlens: Tensor | None, mask: Tensor | None, mean_weights: Tensor | None, seeds: Tensor | None, B: int, L: int,
    dropped: int, pools: bool, overwrite: bool, need_A: bool,
) -> None:  # fmt: skip
    """Nothing: it fills ``outs``, the gradients of what the routers read, where that is not x; of lora_A where needed;
    and of the routers given."""


def run_project_backward(
    outs, dx, x, du, lora_A, router_A, router_B, router_AB, pooled, dlogits, dlooked, index_a, row_sums, cu_seqlens,
    mask, mean_weights, seeds, B, L, dropped, pools, overwrite, need_A,
):  # fmt: skip
    (G, _, R), (E, D) = du.shape, lora_A[0].shape
    routes, lora_A = bool(router_A), as_pools(lora_A)
    taken = iter(outs)
    spread = next(taken) if routes and not pools else None
    dlora_A, *drouters = (
        tuple(next(taken) for _ in range(G)) if there else None for there in (need_A, router_A, router_B, router_AB)
    )
    dtable = None
    if routes:
        if pools and dx is not None:
            spread = du.new_empty(B, D)
        both = as_pools([*router_A, *router_B])  # of one dtype, because a program picks a pointer among all
        routers = both[:G], both[G:] or None
        dtable = launch_routers_backward(
            dlogits, dlooked, pooled, routers, mean_weights if pools else None, 1.0 / (L or 1) if pools else 1.0,
            index_a, lora_A, row_sums, drouters, spread,
        )  # fmt: skip
    if dx is not None or need_A:
        parts, owner, chunk = launch_walk(
            None if x is None else as_rows(x), dx, overwrite, du, lora_A, index_a, spread if pools else None,
            mask if routes else None, seeds, dropped, cu_seqlens, B, L, need_A,
        )  # fmt: skip
    if need_A:
        launch = plan_project_gather(tuning.architecture(du.device), G, R, E, D, parts.shape[1], chunk, B, L)
        launch(
            du.device, parts=parts, owner=owner, index=index_a, dtable=dtable, row_sums=row_sums,
            router_AB=as_pools(router_AB) if router_AB else None, dlora_A=dlora_A,
        )  # fmt: skip


@plan
def plan_project_gather(arch, G, R, E, D, chunks, chunk, B, L) -> Launch:
    tile = tuning.gather(arch, tuning.pad(E))
    return Launch(
        project_gather_kernel, (tuning.divide(D, tile.columns), G), tile.options,
        chunks=chunks, B=B, L=L, D=D, G=G, E=E, R=R, E_PAD=tuning.pad(E), CHUNK=chunk, BLOCK_E=tuning.BLOCK_E,
        BLOCK_K=tile.rows, BLOCK_D=tile.columns,
    )  # fmt: skip


PROJECT_BACKWARD = Op("project_backward", run_project_backward, allocate_project_backward, mutates=["outs", "dx"])
