"""From the gradients of the logits and of the looked-up rows of T to those of the routers and of what they read.

    drouter[g] = Σ_b dlogits[g, b]ᵀ pooled[b]                  spread[b] = weight_b Σ_g dlogits[g, b] · router[g]
    dT[g, i, f] = Σ_{b: index_a[i] = f} dlooked[g, b, i]       drouter_AB[g, i] = dTᵀ · lora_A[g]

``spread`` is what every pooled token of an instance gets; in task routing, the gradient of what the routers read.
What comes to lora_A through T is added where lora_A's gradient is gathered (project_backward.py).
"""

import triton
import triton.language as tl

from . import tuning
from .launch import Launch, plan
from .siblings import member


@triton.jit
def router_program(role, dlogits, pooled, drouter_A, drouter_B, B, W, w,
    G: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A column block of one router's gradient, a product over the instances."""
    e, inside = tl.arange(0, E_PAD), w < W
    acc = tl.zeros([E_PAD, BLOCK_D], tl.float32)
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        place = dlogits + (role * B + b[None, :]) * E + e[:, None]
        weight = tl.load(place, mask=(e < E)[:, None] & (b < B)[None, :], other=0.0)  # [E_PAD, BLOCK_B]
        row = tl.load(
            pooled + b[:, None].to(tl.int64) * W + w[None, :], mask=(b < B)[:, None] & inside[None, :], other=0.0
        )
        acc = tl.dot(weight, row, acc, input_precision="ieee")
    out = member(drouter_A, role % G, G)
    if drouter_B is not None:
        out = tl.where(role < G, out, member(drouter_B, role % G, G))
    tl.store(out + e[:, None] * W + w[None, :], acc, mask=(e < E)[:, None] & inside[None, :])


@triton.jit
def spread_program(dlogits, router_A, router_B, mean_weights, mean_weight, spread, B, W, w,
    G: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A column block of ``spread`` [B, W], a sum over all routers."""
    inside = w < W
    for first in range(0, B, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        acc = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for start in range(0, E, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            tile = (e < E)[:, None] & inside[None, :]
            there = (b < B)[:, None] & (e < E)[None, :]
            for g in tl.static_range(G):
                weight = tl.load(dlogits + (g * B + b[:, None]) * E + e[None, :], mask=there, other=0.0)
                r_tile = tl.load(router_A[g] + e[:, None] * W + w[None, :], mask=tile, other=0.0).to(tl.float32)
                acc = tl.dot(weight, r_tile, acc, input_precision="ieee")
                if router_B is not None:
                    weight = tl.load(dlogits + ((G + g) * B + b[:, None]) * E + e[None, :], mask=there, other=0.0)
                    r_tile = tl.load(router_B[g] + e[:, None] * W + w[None, :], mask=tile, other=0.0).to(tl.float32)
                    acc = tl.dot(weight, r_tile, acc, input_precision="ieee")
        token_weight = mean_weight
        if mean_weights is not None:
            token_weight = tl.load(mean_weights + b, mask=b < B, other=0.0)[:, None]
        place = spread + b[:, None].to(tl.int64) * W + w[None, :]
        tl.store(place, acc * token_weight, mask=(b < B)[:, None] & inside[None, :])


@triton.jit
def table_backward_program(
    role, dlooked, index_a, lora_A, row_sums, dtable, drouter_AB, B, D, d,
    G: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dT of one slot, a sum over the instances by what they had looked up, and a column block of drouter_AB."""
    g, i = role // R, role % R
    inside = d < D
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        product = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
        for column in range(0, E, BLOCK_E):
            f = column + tl.arange(0, BLOCK_E)
            dt_tile = tl.zeros([BLOCK_E, BLOCK_E], tl.float32)  # [e, f]
            for first in range(0, B, BLOCK_B):
                b = first + tl.arange(0, BLOCK_B)
                row = ((g * B + b) * R + i).to(tl.int64)
                factor = tl.load(index_a + row, mask=b < B, other=-1)
                there = (e < E)[:, None] & (b < B)[None, :]
                looked = tl.load(dlooked + row[None, :] * E + e[:, None], mask=there, other=0.0)
                chosen = (factor[:, None] == f[None, :]).to(tl.float32)  # [BLOCK_B, BLOCK_E]
                dt_tile = tl.dot(looked, chosen, dt_tile, input_precision="ieee")
            if tl.program_id(0) == 0:
                place = dtable + (role * E + e[:, None]).to(tl.int64) * E + f[None, :]
                tl.store(place, dt_tile, mask=(e < E)[:, None] & (f < E)[None, :])
            tile = (f < E)[:, None] & inside[None, :]
            if row_sums is None:
                a_tile = tl.load(member(lora_A, g, G) + f[:, None] * D + d[None, :], mask=tile, other=0.0)
                a_tile = a_tile.to(tl.float32)
            else:
                a_tile = tl.where(tile, tl.load(row_sums + role * 2 * E + f, mask=f < E, other=0.0)[:, None], 0.0)
            product = tl.dot(dt_tile, a_tile, product, input_precision="ieee")
        if drouter_AB is not None:
            place = member(drouter_AB, g, G) + (i * E + e[:, None]).to(tl.int64) * D + d[None, :]
            tl.store(place, product, mask=(e < E)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["mean_weight", "B"])
def routers_backward_kernel(
    dlogits, pooled, router_A, router_B, mean_weights, mean_weight, drouter_A, drouter_B, spread,
    dlooked, index_a, lora_A, row_sums, dtable, drouter_AB, B, W, D,
    G: tl.constexpr, E: tl.constexpr, R: tl.constexpr, E_PAD: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A column block of: each router's gradient, then ``spread``, then each slot's dT."""
    role = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    routers: tl.constexpr = G if router_B is None else 2 * G
    if role < routers:
        router_program(role, dlogits, pooled, drouter_A, drouter_B, B, W, d, G, E, E_PAD, BLOCK_B, BLOCK_D)
    elif role == routers:
        if spread is not None:
            spread_program(
                dlogits, router_A, router_B, mean_weights, mean_weight, spread, B, W, d, G, E, BLOCK_E, BLOCK_B, BLOCK_D
            )
    elif dlooked is not None:
        table_backward_program(
            role - routers - 1, dlooked, index_a, lora_A, row_sums, dtable, drouter_AB, B, D, d,
            G, E, R, BLOCK_E, BLOCK_B, BLOCK_D,
        )  # fmt: skip


def launch_routers_backward(
    dlogits, dlooked, pooled, routers, mean_weights, mean_weight, index_a, lora_A, row_sums, drouters, spread
):
    """Fill the routers' gradients and ``spread`` [B, W], or None; and return dT [G, R, E, E], or None.

    ``routers`` and ``drouters`` are those of A, of B or None, and ``drouters`` also those of AB or None.
    """
    (router_A, router_B), (drouter_A, drouter_B, drouter_AB) = routers, drouters
    (_, G, _, E), R, looked = dlogits.shape, index_a.shape[2], dlooked is not None
    dtable = dlogits.new_empty(G, R, E, E) if looked else None
    launch = plan_routers_backward(
        tuning.architecture(dlogits.device), dlogits.shape, router_A[0].shape[1], lora_A[0].shape[1], R, looked,
        mean_weight,
    )  # fmt: skip
    launch(
        dlogits.device, dlogits=dlogits, pooled=pooled, router_A=router_A, router_B=router_B, mean_weights=mean_weights,
        drouter_A=drouter_A, drouter_B=drouter_B, spread=spread, dlooked=dlooked, index_a=index_a, lora_A=lora_A,
        row_sums=row_sums, dtable=dtable, drouter_AB=drouter_AB,
    )  # fmt: skip
    return dtable


@plan
def plan_routers_backward(arch, shape, W, D, R, looked, mean_weight) -> Launch:
    pools, G, B, E = shape
    tile = tuning.routers(arch, tuning.pad(E))
    roles = pools * G + 1 + (G * R if looked else 0)
    return Launch(
        routers_backward_kernel, (tuning.divide(max(W, D), tile.columns), roles), tile.options,
        mean_weight=mean_weight, B=B, W=W, D=D, G=G, E=E, R=R, E_PAD=tuning.pad(E),
        BLOCK_E=min(tuning.pad(E), tuning.BLOCK_E), BLOCK_B=16, BLOCK_D=tile.columns,
    )  # fmt: skip
