"""A group of siblings gives what its members give one by one: the same bits forward, and the same gradients."""

import pytest
import torch

import mixlora_kernels as mk

from .cases import MODES, make_config, make_input, make_mask, make_task, mode_id, relative_error

WIDTHS = (9, 5, 9)  # d_out of the siblings

# x's gradient is a sum of as many terms in another order; the others are the same products of the same numbers, taken
# as one product or as several: some float64 roundings.
EXACT = 1e-12


def make_group(*, seed=0, d_in=12, **settings):
    """Weights and factors of three siblings, all away from zero, and their configuration."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) / 2

    config = make_config(**settings)
    adapters = [mk.MixLoRAAdapter(d_in, d_out, config, dtype=torch.float64) for d_out in WIDTHS]
    for adapter in adapters:
        for parameter in adapter.parameters():
            parameter.data.copy_(draw(*parameter.shape))
    bases = [mk.FrozenLinear(draw(d_out, d_in), draw(d_out)) for d_out in WIDTHS]
    return bases, adapters, config


def single(x, bases, adapters, config, context, training, backend):
    """Each member by itself, as a model calls one layer after the other."""
    results = [
        mk.mixlora(x, base, adapter.factors, config, context and context._replace(routing=given), training=training,
                   backend=backend)
        for base, adapter, given in zip(
            bases, adapters, (context.routing.member(g) for g in range(len(bases)))
            if context and context.routing else [None] * len(bases)
        )
    ]  # fmt: skip
    return [y for y, _ in results], [routing for _, routing in results]


def together(x, bases, adapters, config, context, training, backend):
    ys, routing = mk.mixlora_siblings(
        x, bases, [adapter.factors for adapter in adapters], config, context, training=training, backend=backend
    )
    return ys, [routing.member(g) for g in range(len(ys))]


def gradients(ys, routings, x, adapters):
    generator = torch.Generator().manual_seed(9)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in ys)
    if routings[0].probs_a.requires_grad:
        loss = loss + sum((routing.probs_a[:, 0] ** 2).sum() for routing in routings)
    inputs = [x, *(p for adapter in adapters for p in adapter.parameters() if p.requires_grad)]
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def context_for(mode, layout):
    fields = {"mask": make_mask(4, 40)} if layout == "masked" else {}
    if layout == "packed":
        fields["cu_seqlens"] = torch.tensor([0, 4, 5, 90, 160])
    if mode["routing"] == "task":
        fields |= {"task": make_task(4)}
    return mk.RoutingContext(**fields)


@pytest.mark.parametrize("layout", ["rows", "masked", "packed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_as_single_layers(mode, dropout, layout):
    bases, adapters, config = make_group(**mode, dropout=dropout)
    x = make_input(1, 160, 12) if layout == "packed" else make_input(4, 40, 12)
    results = []
    for run in (single, together):
        torch.manual_seed(3)
        ys, routings = run(x, bases, adapters, config, context_for(mode, layout), True, "torch")
        results.append((ys, routings, gradients(ys, routings, x, adapters)))
    (ys, routings, wanted), (ys1, routings1, got) = results
    assert all(map(torch.equal, ys, ys1))
    for one, other in zip(routings, routings1):
        assert all(map(torch.equal, one, other))
    for one, other in zip(wanted, got):
        assert (one is None) == (other is None)
        assert one is None or relative_error(other, one) <= EXACT


def test_a_kept_routing():
    bases, adapters, config = make_group()
    x = make_input(4, 40, 12)
    _, routing = mk.mixlora_siblings(x, bases, [adapter.factors for adapter in adapters], config)
    context, step = mk.RoutingContext(routing=routing.detach()), make_input(4, 1, 12)
    for training in (False, True):
        with torch.set_grad_enabled(training):
            ys, _ = single(step, bases, adapters, config, context, training, "torch")
            ys1, _ = together(step, bases, adapters, config, context, training, "torch")
        assert all(map(torch.equal, ys, ys1))


def test_a_member_that_nobody_used_has_no_gradient():
    bases, adapters, config = make_group()
    x = make_input(4, 40, 12)
    ys, _ = mk.mixlora_siblings(x, bases, [adapter.factors for adapter in adapters], config)
    (ys[0].sum() + ys[2].sum()).backward()
    assert all(parameter.grad is None for parameter in adapters[1].parameters())
    assert all(parameter.grad is not None for adapter in adapters[::2] for parameter in adapter.parameters())


def test_as_many_adapters_as_bases():
    bases, adapters, config = make_group()
    with pytest.raises(ValueError, match="as many adapters as bases are needed, got 2 and 3"):
        mk.mixlora_siblings(make_input(4, 6, 12), bases, [adapter.factors for adapter in adapters[:2]], config)
