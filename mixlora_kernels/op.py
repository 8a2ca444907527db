"""The operation: check the input, find the instances, select a backend.

``mixlora_siblings`` is the operation on a group of G frozen maps that read the same x. ``mixlora`` is a group of one.
``backends/node.py`` gives the equations of the forward and the backward.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .backends.base import Factors, FrozenLinear, Group, Options
from .backends.node import autocasts
from .backends.select import select
from .checks import check_context, check_input, check_routing
from .config import MixLoRAConfig
from .dropout import draw_seeds, dropped_levels, keep_scale
from .routing import Routing, RoutingContext, find_instances, find_task


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
        base: the frozen map's output [..., d_out], or the map itself. Given the map, one autograd node computes its
            product too, and allocates nothing of the size of x or y but y and x's gradient.
        factors: the adapter's parameters, in any floating dtype.
        config: what to compute.
        context: which tokens form an instance, and which of them its mean runs over; see ``RoutingContext``.
        training: whether dropout applies.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for the fastest one that takes x.

    Returns:
        y [..., d_out] in the base's dtype, and the ``Routing`` of the B instances.

    Raises:
        TypeError, ValueError: x, base or context do not fit. Nothing was computed.
    """
    context = check_context(context)
    (y,), routing = mixlora_siblings(
        x, (base,), (factors,), config, context.unsqueeze(), training=training, backend=backend
    )
    return y, routing.member(0) if context.routing is None else context.routing


def mixlora_siblings(
    x: Tensor,
    bases: Sequence[Tensor | FrozenLinear],
    factors: Sequence[Factors],
    config: MixLoRAConfig,
    context: RoutingContext | None = None,
    *,
    training: bool = False,
    backend: str | None = None,
) -> tuple[Sequence[Tensor], Routing]:
    """The operation of ``mixlora`` for G frozen maps that read the same x, such as a decoder layer's q, k and v.

    Each map has its own adapter and its own routing. Each output has the bits of ``mixlora``, and x is read once for
    all.

    Args:
        x, context, training, backend: as in ``mixlora``.
        bases, factors: ``mixlora``'s base and factors for each sibling. E and d_in are the same for all; d_out may
            differ.
        config: what each of them computes.

    Returns:
        The outputs [..., d_out], and a ``Routing`` whose tensors are [G, B, ...]. ``routing.member(g)`` is the routing
        of sibling g. ``context.routing`` takes this form too.

    Raises:
        TypeError, ValueError: x, the bases or the context do not fit. Nothing was computed.
    """
    context = check_context(context)
    check_input(x, bases, factors, config, routes=context.routing is None and config.has_routers)
    scope: AbstractContextManager = nullcontext()
    if autocasts(x.device.type) and x.dtype != torch.float64:
        x, scope = x.to(torch.get_autocast_dtype(x.device.type)), torch.autocast(x.device.type, enabled=False)
    with scope:
        group, implementation = _group(x, bases, factors, config, context, training), select(backend, x)
        given = group.given
        # Not in training: activation checkpointing runs a forward without gradients, whose recomputation, with
        # gradients, has to give the same bits.
        if given is not None and not training and implementation.decodes(group) and not _learns(group, given):
            ys, routing = implementation.decode(group), given
        else:
            ys, routing = implementation.apply(group)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys], routing


def _group(
    x: Tensor, bases: Sequence[Tensor | FrozenLinear], factors: Sequence[Factors], config: MixLoRAConfig,
    context: RoutingContext, training: bool,
) -> Group:  # fmt: skip
    """What the backend is given: the tokens one after another, the instances, and the routing that is not computed."""
    routes, G = context.routing is None and config.has_routers, len(bases)
    reads_x = routes and config.routing == "instance"
    instances = context.instances or find_instances(x, context, needs_mean=reads_x)
    read = None
    if routes and config.task_dim is not None:
        read = find_task(context, instances.count, config.task_dim)
        read = read.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    p = config.dropout if training and dropped_levels(config.dropout) else 0.0
    given, seeds = context.routing, None
    if given is not None:
        check_routing(given, config, G, instances.count)
        given = given.prepare(torch.promote_types(x.dtype, torch.float32))
    elif not routes:
        given, seeds = _draw(G, instances.count, config, x, bool(p))
    if p and seeds is None:
        seeds = draw_seeds(G, x.device)
    return Group(
        x=x.reshape(-1, x.shape[-1]),
        bases=[base if isinstance(base, FrozenLinear) else base.reshape(-1, base.shape[-1]) for base in bases],
        factors=factors,
        read=read,
        given=given,
        seeds=seeds,
        instances=instances,
        options=Options(
            r=config.r,
            scale=config.scaling * (keep_scale(p) if p else 1.0),
            p=p,
            gate=config.gate,
            conditioning=config.conditioning if config.has_conditioning else None,
            tied=not config.chooses_b,
            reads_x=config.routing == "instance",
            dtype=x.dtype,
        ),
    )


def _learns(group: Group, given: Routing) -> bool:
    """Whether a backward may follow: whether autograd records, and a tensor of the call requires a gradient."""
    if not torch.is_grad_enabled():
        return False
    outputs = (base for base in group.bases if not isinstance(base, FrozenLinear))
    parameters = (tensor for factors in group.factors for tensor in factors if tensor is not None)
    return any(tensor.requires_grad for tensor in (group.x, given.gate, *outputs, *parameters))


def _draw(G: int, count: int, config: MixLoRAConfig, x: Tensor, drops: bool) -> tuple[Routing, Tensor | None]:
    """Draw r distinct factors for each instance (Table 2's baseline), and seeds for dropout if ``drops``.

    Both come from torch's generator for x's device. Each sibling draws all it needs before the next one does, as single
    layers would.
    """
    device, dtype = x.device, torch.promote_types(x.dtype, torch.float32)

    def index() -> Tensor:
        return torch.rand(count, config.num_factors, device=device).argsort(-1)[:, : config.r]

    index_a, index_b, seeds = [], [], []
    for _ in range(G):
        index_a.append(index())
        index_b.append(index() if config.chooses_b else index_a[-1])
        if drops:
            seeds.append(draw_seeds(1, device))
    first = torch.stack(index_a)
    second = torch.stack(index_b) if config.chooses_b else first
    probs = torch.full((G, count, config.num_factors), 1 / config.num_factors, device=device, dtype=dtype)
    gate = torch.ones(first.shape, device=device, dtype=dtype)
    return Routing(first, second, gate, probs, probs), torch.cat(seeds) if drops else None
