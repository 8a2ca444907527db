"""The operation in C, for a CPU: float32, without dropout.

It is compiled when the package is installed, where there is a C compiler with OpenMP (``setup.py``); elsewhere, and for
whatever else, the torch backend serves. The choice of factors comes first and the products after it, so that x meets
the r chosen factors alone: to read x once more costs a CPU less than to multiply it with the rest of the pool.
"""

import ctypes
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

    The state is the chosen products [N, r], the means [B, d_in], and p_IFS, p_CFS and q in one array.

    Raises:
        IndexError: a given index is of no factor.
    """
    call = Call(x.shape[0], factors, instances, options)
    B, N, D, E, r = call.B, call.N, call.D, call.E, call.r
    call.read_rows(x)
    out = y if in_place else empty(*y.shape)
    chosen, mean, softmaxes = empty(N, r), None, None
    call.from_, call.y, call.chosen = call.read(y), out.data_ptr(), chosen.data_ptr()
    if given is not None:
        routing = *given, None, None
        call.index_a, call.index_b, call.gate = map(call.read, given)
    else:
        index_a, index_b = empty(B, r, dtype=torch.int64), empty(B, r, dtype=torch.int64)
        routing = index_a, index_b, empty(B, r), empty(B, E), empty(B, E)
        call.index_a, call.index_b, call.gate, call.probs_a, call.probs_b = (t.data_ptr() for t in routing)
        softmaxes, scratch = empty(2 + r, B, E), empty(2 * B * E + r * E * E)
        _set_softmaxes(call, softmaxes)
        if options.pools:
            mean = empty(B, D)
            call.mean, call.logits = mean.data_ptr(), scratch.data_ptr()
        else:
            call.logits = call.read(pooled @ torch.cat(factors[2:4]).to(pooled.dtype).T)
        if options.conditioning == "factors":
            call.table = scratch.data_ptr() + 4 * 2 * B * E
        elif options.conditioning == "published":  # an outer product of two sums, which is torch's
            call.table = call.read(condition_table(factors.lora_A, factors.router_AB, options.conditioning))
            call.router_ab = None
    if load().mixlora_forward(ctypes.byref(call)):
        raise IndexError(f"routing.index_a and routing.index_b must be of 0 to {E - 1}, a pool of {E} factors")
    return out.to(y.dtype), routing, (chosen, mean, softmaxes)


def backward(
    dy: Tensor, dx: Tensor | None, drouting, x: Tensor | None, factors: Factors, pooled: Tensor | None, seed: None,
    routing, state, instances: Instances, options: Options, needs: Needs,
):  # fmt: skip
    """The gradients; arguments and results are those of ``staged.backward``."""
    (index_a, index_b, gate, probs_a, probs_b), (chosen, mean, softmaxes) = routing, state
    call = Call(dy.shape[0], factors, instances, options)
    B, N, D, O, E, r, parts = call.B, call.N, call.D, call.O, call.E, call.r, call.parts
    call.dy, call.chosen, call.gate = call.read(dy), chosen.data_ptr(), call.read(gate)
    call.index_a, call.index_b = call.read(index_a), call.read(index_b)
    if x is not None:
        call.read_rows(x)
    if needs.x:
        dx = empty(N, D).zero_() if dx is None else dx
        call.dx = dx.data_ptr()
    dgate = empty(B, r)
    call.dgate = dgate.data_ptr()
    dlora_A, dlora_B = empty(E, D) if needs.lora_A else None, empty(E, O) if needs.lora_B else None
    scratch = empty(N * r + B * E + B * D + (parts * E * max(D, O) if parts > 1 else 0))
    call.du = scratch.data_ptr()
    call.dq = call.du + 4 * N * r
    call.dmean = call.dq + 4 * B * E
    part = call.dmean + 4 * B * D  # of one gradient after the other
    if needs.lora_A:
        call.dlora_a = dlora_A.data_ptr()
        call.part_a = part if parts > 1 else call.dlora_a
    if needs.lora_B:
        call.dlora_b = dlora_B.data_ptr()
        call.part_b = part if parts > 1 else call.dlora_b

    drouters = dlogits = dtable = drouter_AB = dpooled = None
    published = options.conditioning == "published"
    if published:
        call.router_ab = None
    if needs.routers:
        call.dgate_given, call.dprobs_a, call.dprobs_b = map(call.read, drouting)
        call.probs_a, call.probs_b = probs_a.data_ptr(), probs_b.data_ptr()
        _set_softmaxes(call, softmaxes)
        dlogits = empty(B, 2 * E)
        call.dlogits = dlogits.data_ptr()
        if options.pools:
            drouters = empty(2 * E, D)
            call.mean, call.drouters = mean.data_ptr(), drouters.data_ptr()
        if options.conditioning is not None:
            dtable = empty(r, E, E)
            call.dtable = dtable.data_ptr()
        if options.conditioning == "factors":
            drouter_AB = empty(r, E, D)
            call.drouter_ab = drouter_AB.data_ptr()
    load().mixlora_backward(ctypes.byref(call))

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
    options = Options(index_a.shape[1], scale, 0.0, "binary", None, False, x.dtype, None)
    factors = Factors(lora_A, lora_B, None, None, None)
    return forward(y, x, factors, None, (index_a, index_b, gate), None, instances, options, in_place)[0]


def _set_softmaxes(call: Call, softmaxes: Tensor) -> None:
    """p_IFS and p_CFS [B, E] and q [B, r, E], from one array."""
    call.p_ifs = softmaxes.data_ptr()
    call.p_cfs = call.p_ifs + 4 * call.B * call.E
    call.q = call.p_cfs + 4 * call.B * call.E
