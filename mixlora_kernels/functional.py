"""The differentiable operation: it checks its input, chooses the backend, and is one autograd.Function for all.

With u = drop(x) · lora_Aᵀ [N, E], c = scaling and v = dy · lora_Bᵀ [N, E], one token t of an instance has

    y       += Σ_i c gate_i · u[index_a[i]] · lora_B[index_b[i]]
    dgate_i  = c Σ_t u[index_a[i]] · v[index_b[i]]              (the sum is the instance's)
    du[index_a[i]] = c gate_i · v[index_b[i]]
    dlora_B  = Σ_t sᵀ dy,  s[index_b[i]] = c gate_i · u[index_a[i]]
    dlora_A  = Σ_t duᵀ drop(x)      + what comes through T of the conditional router
    dx       = dy · W + drop(du · lora_A) + pooled share · (dlogits_a · router_A + dlogits_b · router_B)

and dgate goes through gate, softmax and T (backends/torch/route.py) to dlogits_a, dlogits_b and dT. A factor
that nobody chose has a zero column in du, in s and a zero row in dT: its gradient is exactly zero.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, reference
from .backends.contract import Factors, Needs, Options
from .backends.torch import dropout as block_dropout
from .config import MixLoRAConfig
from .frozen import frozen_product, frozen_product_backward
from .routing import Instances, Routing, RoutingContext, find_instances, find_task


class FrozenLinear(NamedTuple):
    """A frozen product that may run inside the operation's node, where the update is added in place."""

    weight: Tensor  # [d_out, d_in]
    bias: Tensor | None  # [d_out]


def mixlora(
    x: Tensor,
    base: Tensor | FrozenLinear,
    factors: Factors,
    config: MixLoRAConfig,
    context: RoutingContext | None = None,
    *,
    training: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Routing]:
    """Conditional Mixture-of-LoRA on top of a frozen linear map: Equations 1 and 5 to 9.

    Args:
        x: hidden states [B, ..., d_in], or [L, d_in] for one instance, or [N, d_in] or [1, N, d_in] packed.
        base: the frozen map's output [..., d_out], or the map itself; its product then runs in the same
            autograd node, so that nothing of the size of x or y is allocated but y and x's gradient.
        factors: the adapter's parameters, in any floating dtype.
        config: what to compute.
        context: what the instances are, and which of their tokens are pooled; see ``RoutingContext``.
        training: whether dropout applies.
        backend: ``"reference"``, ``"torch"``, ``"native"``, ``"triton"``, or None for the best one for x.

    Returns:
        y [..., d_out] in the base's dtype, and the ``Routing`` of the B instances.

    Raises:
        TypeError, ValueError: x, base or context do not fit; nothing was computed.
    """
    context = context or RoutingContext()
    check_input(x, base, factors)
    if autocasts(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return _mixlora(x, base, factors, config, context, training, backend)
    return _mixlora(x, base, factors, config, context, training, backend)


def _mixlora(x, base, factors, config, context, training, backend):
    routed = context.routing is None and config.has_routers
    instances = find_instances(x, context, pooled=routed and config.routing == "instance")
    p = config.dropout if training and block_dropout.dropped_levels(config.dropout) else 0.0
    pooled = None
    if routed and config.routing == "task":
        pooled = find_task(context, instances.count, config.task_dim).to(torch.promote_types(x.dtype, torch.float32))
    given = context.routing or (None if routed else draw_routing(instances.count, config, x))
    if given is not None:
        check_routing(given, instances.count, config)
    seed = block_dropout.draw_seed(x.device) if p else None
    setting = None if config.chooses_b else "conditioning='tied'"
    setting = "gate='normalized'" if config.gate == "normalized" else setting
    module = backends.select(backend, x, config.num_factors, bool(p), setting)
    if module is reference:
        return _reference(x, base, factors, config, context, instances, given, seed, p)
    weight, bias = base if isinstance(base, FrozenLinear) else (None, None)
    y = None if isinstance(base, FrozenLinear) else base.reshape(-1, base.shape[-1])
    chosen = (None, None, None) if given is None else (given.gate, given.index_a, given.index_b)
    tokens, routing = x.reshape(-1, x.shape[-1]), None
    # Not in training: a checkpointed forward without gradients must have the bits of its recomputation.
    few = given is not None and not training and tokens.shape[0] * config.r <= module.FEW
    if few and not learns(x, base, factors, given):
        lora_A, lora_B = factors[:2]
        in_place = y is None
        y = frozen_product(tokens, weight, bias) if in_place else y
        y = module.decode(
            y, tokens, lora_A, lora_B, given.index_a, given.index_b, given.gate, config.scaling, instances, in_place
        )
    else:
        options = Options(
            r=config.r,
            scale=config.scaling * (block_dropout.keep_scale(p) if p else 1.0),
            p=p,
            gate=config.gate,
            conditioning=config.conditioning if config.has_conditioning else None,
            tied=not config.chooses_b,
            pools=config.routing == "instance",
            dtype=x.dtype,
            backend=module,
        )
        outputs = _MixLoRA.apply(tokens, y, weight, bias, *factors, pooled, *chosen, seed, instances, options)
        y, *routing = outputs if given is None else (outputs,)
    return y.view(*x.shape[:-1], y.shape[-1]), given or Routing(*routing)


class _MixLoRA(torch.autograd.Function):
    """One node for the adapter and, where it is given as weights, the frozen product. N tokens, 2-D tensors."""

    @staticmethod
    def forward(
        ctx, x, y, weight, bias, lora_A, lora_B, router_A, router_B, router_AB,
        pooled, gate, index_a, index_b, seed, instances: Instances, options: Options,
    ):  # fmt: skip
        routed, in_place = index_a is None, y is None
        if in_place:
            y = frozen_product(x, weight, bias)
        factors = Factors(lora_A, lora_B, router_A, router_B, router_AB)
        given = None if routed else (index_a, index_b, gate)
        y, routing, state = options.backend.forward(y, x, factors, pooled, given, seed, instances, options, in_place)

        ctx.set_materialize_grads(False)
        ctx.options, ctx.routed, ctx.device_type = options, routed, x.device.type
        ctx.count, ctx.length, ctx.tokens = instances.count, instances.length, x.shape[0]
        reads_x = any(ctx.needs_input_grad[i] for i in (4, 6, 7, 8))  # lora_A and the routers: their gradient reads x
        ctx.save_for_backward(
            x if reads_x else None, weight, *factors, pooled, seed,
            instances.cu_seqlens, instances.segment, instances.mask, *routing, *state,
        )  # fmt: skip
        if not routed:
            return y
        index_a, index_b, gate, *_ = routing
        ctx.mark_non_differentiable(index_a, index_b, *((gate,) if options.gate == "binary" else ()))
        return y, *routing

    @staticmethod
    def backward(ctx, dy, _index_a=None, _index_b=None, dgate=None, dprobs_a=None, dprobs_b=None):
        if autocasts(ctx.device_type):  # whoever calls backward() under it
            with torch.autocast(ctx.device_type, enabled=False):
                return _MixLoRA.gradients(ctx, dy, dgate, dprobs_a, dprobs_b)
        return _MixLoRA.gradients(ctx, dy, dgate, dprobs_a, dprobs_b)

    @staticmethod
    def gradients(ctx, dy, dgate, dprobs_a, dprobs_b):
        x, weight, *saved = ctx.saved_tensors
        factors, pooled, seed, cu_seqlens, segment, mask = Factors(*saved[:5]), *saved[5:10]
        routing, state = saved[10:15], saved[15:]
        need_x, need_y, _, _, *need_factors, need_pooled, need_gate = ctx.needs_input_grad[:11]
        options, instances = ctx.options, Instances(ctx.count, ctx.length, cu_seqlens, segment, mask)
        if dy is None:  # a loss of the probabilities alone
            dy = factors.lora_B.new_zeros(ctx.tokens, factors.lora_B.shape[1], dtype=options.dtype)
        # With a binary gate the routers learn from a loss of the probabilities alone.
        routes = ctx.routed and not (options.gate == "binary" and dprobs_a is None and dprobs_b is None)
        needs = Needs(need_x, need_factors[0], need_factors[1], routes, routes or need_gate)

        dx = frozen_product_backward(dy, weight) if need_x and weight is not None else None
        dx, dfactors, dpooled, dgate = options.backend.backward(
            dy, dx, (dgate, dprobs_a, dprobs_b), x, factors, pooled, seed, routing, state, instances, options, needs
        )
        dfactors = (
            d.to(factor.dtype) if need and d is not None else None
            for d, factor, need in zip(dfactors, factors, need_factors)
        )
        return (
            dx if need_x else None,
            dy if need_y else None,
            None,
            None,
            *dfactors,
            dpooled if need_pooled else None,
            dgate if need_gate else None,
            None,
            None,
            None,
            None,
            None,
        )


def learns(x: Tensor, base: Tensor | FrozenLinear, factors: Factors, given: Routing) -> bool:
    """Whether a gradient can be asked for."""
    if not torch.is_grad_enabled():
        return False
    inputs = (x, *((base,) if isinstance(base, Tensor) else ()), *factors, given.gate)
    return any(t is not None and t.requires_grad for t in inputs)


def _reference(x, base, factors, config, context, instances, given, seed, p):
    """The same through ``reference``, an instance at a time."""
    frozen = frozen_product(x, *base) if isinstance(base, FrozenLinear) else base
    tokens, frozen = x.reshape(-1, x.shape[-1]), frozen.reshape(-1, frozen.shape[-1])
    dropped = tokens
    if seed is not None:
        dropped = tokens * block_dropout.keep_mask(seed, tokens, p) * block_dropout.keep_scale(p)
    starts = context.cu_seqlens.tolist() if instances.length is None else None
    outputs, routings = [], []
    for b in range(instances.count):
        rows = slice(starts[b], starts[b + 1]) if starts else slice(b * instances.length, (b + 1) * instances.length)
        y, routing = reference.mixlora(
            tokens[rows], frozen[rows], *factors, r=config.r, scaling=config.scaling,
            conditioning=config.conditioning, gate=config.gate,
            mask=None if instances.mask is None else instances.mask[rows],
            task=None if context.task is None else context.task[b].reshape(-1, context.task.shape[-1]),
            task_mask=None if context.task_mask is None else context.task_mask[b],
            chosen=None if given is None else tuple(t[b] for t in given[:3]), dropped=dropped[rows],
        )  # fmt: skip
        outputs.append(y)
        routings.append(routing)
    y = torch.cat(outputs).view(*x.shape[:-1], -1)
    return y, Routing(*map(torch.stack, zip(*routings))) if given is None else given


def draw_routing(count: int, config: MixLoRAConfig, x: Tensor) -> Routing:
    """Table 2's baseline: r distinct factors for each instance, from torch's generator for x's device."""
    device, dtype = x.device, torch.promote_types(x.dtype, torch.float32)
    index_a, index_b = (
        torch.rand(count, config.num_factors, device=device).argsort(-1)[:, : config.r].contiguous() for _ in "ab"
    )
    index_b = index_b if config.chooses_b else index_a
    probs = torch.full((count, config.num_factors), 1 / config.num_factors, device=device, dtype=dtype)
    return Routing(index_a, index_b, torch.ones(index_a.shape, device=device, dtype=dtype), probs, probs)


def autocasts(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # which knows no meta device


def check_input(x: Tensor, base: Tensor | FrozenLinear, factors: Factors) -> None:
    d_in, d_out = factors.lora_A.shape[1], factors.lora_B.shape[1]
    if not x.is_floating_point():
        raise TypeError(f"x must have a floating dtype, got {x.dtype}")
    if x.dim() < 2 or x.shape[-1] != d_in:
        raise ValueError(f"x must have the shape [B, L, {d_in}] or [L, {d_in}], got {tuple(x.shape)}")
    if x.device != factors.lora_A.device:
        raise ValueError(f"x must be on the adapter's device, {factors.lora_A.device}, got {x.device}")
    if isinstance(base, FrozenLinear):
        if base.weight.shape != (d_out, d_in):
            raise ValueError(f"the base's weight must have the shape {(d_out, d_in)}, got {tuple(base.weight.shape)}")
        if base.weight.dtype != x.dtype and not autocasts(x.device.type):
            raise TypeError(f"x must have the base's dtype, {base.weight.dtype}, got {x.dtype}")
    elif base.shape != (*x.shape[:-1], d_out):
        raise ValueError(f"the base must map x to the shape {(*x.shape[:-1], d_out)}, got {tuple(base.shape)}")


def check_routing(routing: Routing, count: int, config: MixLoRAConfig) -> None:
    chosen, pool = ("[B, r]", (count, config.r)), ("[B, E]", (count, config.num_factors))
    expected = {"index_a": chosen, "index_b": chosen, "gate": chosen, "probs_a": pool, "probs_b": pool}
    for name, (letters, shape) in expected.items():
        tensor = getattr(routing, name)
        if tensor.shape != shape:
            raise ValueError(f"routing.{name} must have the shape {letters} = {shape}, got {tuple(tensor.shape)}")
        if name.startswith("index") and tensor.dtype != torch.int64:
            raise TypeError(f"routing.{name} must be int64, got {tensor.dtype}")
