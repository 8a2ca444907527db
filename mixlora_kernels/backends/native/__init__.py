"""The operation in C, for a CPU: float32, without dropout.

It is compiled when the package is installed, where there is a C compiler with OpenMP (``setup.py``); elsewhere, and for
whatever else, the torch backend serves. The choice of factors comes first and the products after it, so that x meets
the r chosen factors alone: to read x once more costs a CPU less than to multiply it with the rest of the pool.
"""

import sys

import torch
from torch import Tensor

from ...routing import Instances
from ..contract import Factors, Needs, Options
from ..torch.route import condition_table, condition_table_backward
from .call import WIDEST, Call, empty, load

__all__ = ["FEW", "WIDEST", "backward", "decode", "forward", "load"]

FEW = sys.maxsize  # tokens × slots up to which decode serves: any number


def forward(
    y: Tensor, x: Tensor, factors: Factors, pooled: Tensor | None, given, seed: None, instances: Instances,
    options: Options, in_place: bool,
):  # fmt: skip
    """Add the update to y [N, d_out]; arguments and results are those of ``staged.forward``.

    The state is one array: see ``_find_state``.

    Raises:
        IndexError: a given index is of no factor.
    """
    (N, D), B, E, r = x.shape, instances.count, factors.lora_A.shape[0], options.r
    call = Call(N, factors, instances, options)
    call.read_rows(x)
    out = y if in_place else empty(*y.shape)
    call["from"], call["y"] = call.read(y), out.data_ptr()
    if given is not None:
        routing, state = (*given, None, None), empty(N * r)
        call["index_a"], call["index_b"], call["gate"] = map(call.read, given)
        call["chosen"] = state.data_ptr()
    else:
        index_a, index_b = empty(B, r, dtype=torch.int64), empty(B, r, dtype=torch.int64)
        routing = index_a, index_b, empty(B, r), empty(B, E), empty(B, E)
        call["index_a"], call["index_b"], call["gate"], call["probs_a"], call["probs_b"] = map(Tensor.data_ptr, routing)
        state = empty(N * r + B * D + B * E * (4 + r) + r * E * E)
        call["logits"] = _find_state(call, state)
        if not options.pools:
            call["mean"], call["logits"] = 0, call.read(pooled @ torch.cat(factors[2:4]).to(pooled.dtype).T)
        if options.conditioning == "factors":
            call["table"] = call["q"] + 4 * (B * r * E + 2 * B * E)
        elif options.conditioning == "published":  # an outer product of two sums, which is torch's
            table = condition_table(factors.lora_A, factors.router_AB, options.conditioning)
            call["table"], call["router_ab"] = call.read(table), 0
    if call.run("mixlora_forward"):
        raise IndexError(f"routing.index_a and routing.index_b must be of 0 to {E - 1}, a pool of {E} factors")
    return out.to(y.dtype), routing, (state,)


def backward(
    dy: Tensor, dx: Tensor | None, drouting, x: Tensor | None, factors: Factors, pooled: Tensor | None, seed: None,
    routing, state, instances: Instances, options: Options, needs: Needs,
):  # fmt: skip
    """The gradients; arguments and results are those of ``staged.backward``."""
    (N, O), B, (E, D), r = dy.shape, instances.count, factors.lora_A.shape, options.r
    call = Call(N, factors, instances, options)
    call["dy"], call["chosen"] = call.read(dy), state[0].data_ptr()
    call["index_a"], call["index_b"], call["gate"] = map(call.read, routing[:3])
    if x is not None:
        call.read_rows(x)
    if needs.x:
        dx = empty(N, D).zero_() if dx is None else dx
        call["dx"] = dx.data_ptr()
    dgate = empty(B, r)
    call["dgate"] = dgate.data_ptr()
    parts = call["parts"]
    scratch = empty(N * r + B * E + B * D + (parts * E * max(D, O) if parts > 1 else 0))
    call["du"] = scratch.data_ptr()
    call["dq"] = call["du"] + 4 * N * r
    call["dmean"] = call["dq"] + 4 * B * E
    part = call["dmean"] + 4 * B * D  # of one gradient after the other
    dlora_A = dlora_B = None
    if needs.lora_A:
        dlora_A = empty(E, D)
        call["dlora_a"] = dlora_A.data_ptr()
        call["part_a"] = part if parts > 1 else call["dlora_a"]
    if needs.lora_B:
        dlora_B = empty(E, O)
        call["dlora_b"] = dlora_B.data_ptr()
        call["part_b"] = part if parts > 1 else call["dlora_b"]

    drouters = dlogits = dtable = drouter_AB = dpooled = None
    published = options.conditioning == "published"
    if needs.routers:
        _find_state(call, state[0])
        call["probs_a"], call["probs_b"] = routing[3].data_ptr(), routing[4].data_ptr()
        call["dgate_given"], call["dprobs_a"], call["dprobs_b"] = map(call.read, drouting)
        dlogits = empty(B, 2 * E)
        call["dlogits"] = dlogits.data_ptr()
        if options.pools:
            drouters = empty(2 * E, D)
            call["drouters"] = drouters.data_ptr()
        else:
            call["mean"] = 0
        if options.conditioning is not None:
            dtable = empty(r, E, E)
            call["dtable"] = dtable.data_ptr()
        if published:
            call["router_ab"] = 0
        elif dtable is not None:
            drouter_AB = empty(r, E, D)
            call["drouter_ab"] = drouter_AB.data_ptr()
    call.run("mixlora_backward")

    if dlogits is not None and not options.pools:
        drouters, dpooled = dlogits.T @ pooled, dlogits @ torch.cat(factors[2:4]).to(dlogits.dtype)
    if dtable is not None and published:
        dlora_A_table, drouter_AB = condition_table_backward(dtable, factors.lora_A, factors.router_AB, "published")
        if dlora_A is not None:
            dlora_A += dlora_A_table
    drouter_A, drouter_B = (None, None) if drouters is None else drouters.chunk(2)
    return dx, Factors(dlora_A, dlora_B, drouter_A, drouter_B, drouter_AB), dpooled, dgate


def decode(
    y: Tensor, x, lora_A, lora_B, index_a, index_b, gate, scale: float, instances: Instances, in_place: bool
) -> Tensor:
    """Add the update of x [N, d_in] to y [N, d_out], in place or not; no backward."""
    options = Options(index_a.shape[1], scale, 0.0, "binary", None, False, False, x.dtype, None)
    factors = Factors(lora_A, lora_B, None, None, None)
    return forward(y, x, factors, None, (index_a, index_b, gate), None, instances, options, in_place)[0]


def _find_state(call: Call, state: Tensor) -> int:
    """The chosen products [N, r], the means [B, d_in], p_IFS and p_CFS [B, E] and q [B, r, E], end to end in one array;
    returns where it goes on: with the logits [B, 2E] and the table [r, E, E], which the backward does not need."""
    N, D, B, E, r = call["N"], call["D"], call["B"], call["E"], call["r"]
    call["chosen"] = state.data_ptr()
    call["mean"] = call["chosen"] + 4 * N * r
    call["p_ifs"] = call["mean"] + 4 * B * D
    call["p_cfs"] = call["p_ifs"] + 4 * B * E
    call["q"] = call["p_cfs"] + 4 * B * E
    return call["q"] + 4 * B * r * E
