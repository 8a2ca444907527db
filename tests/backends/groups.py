"""Groups of siblings for tests of the stages, and the stages one after the other."""

import torch

from mixlora_kernels.backends.base import Factors, FrozenLinear, Group, Needs, Options
from mixlora_kernels.dropout import keep_scale
from mixlora_kernels.routing import Instances, Routing

from ..cases import make_mask

EVERYTHING = Needs(*[True] * 5)


def draw(*shape, device, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def draw_index(G, B, E, r, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = [torch.randperm(E, generator=generator)[:r] for _ in range(G * B)]
    return torch.stack(index).view(G, B, r).to(device)


def make_instances(B, L, packed, masked, device):
    mask = make_mask(B, L).flatten() if masked else None
    lengths = torch.full((B,), L)
    if packed and B > 1:
        lengths[0], lengths[-1] = lengths[0] - min(2, L - 1), lengths[-1] + min(2, L - 1)
    segment = torch.arange(B).repeat_interleave(lengths)
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    if mask is not None:
        mask[cu_seqlens[:-1]] = True
    counted = torch.ones(B * L) if mask is None else mask.float()
    mean_weights = 1 / torch.zeros(B).index_add_(0, segment, counted)[:, None].to(device)
    mask = None if mask is None else mask.to(device)
    if packed:
        return Instances(B, None, cu_seqlens.to(device), segment.to(device), mask, mean_weights)
    return Instances(B, L, mask=mask, mean_weights=mean_weights if masked else None)


def make_group(
    device, *, B=2, L=20, D=40, widths=(37,), E=7, r=3, packed=False, masked=False, conditioning="factors",
    gate="straight_through", dropout=0.0, task=False, given=False, dtype=torch.float32,
) -> Group:  # fmt: skip
    instances, G = make_instances(B, L, packed, masked, device), len(widths)
    W = 5 if task else D
    tied, table = conditioning == "tied", conditioning in ("factors", "published")

    def factors(g, O):
        shapes = (E, D), (E, O), (E, W), None if tied else (E, W), (r, E, D) if table else None
        return Factors(
            *(None if s is None else draw(*s, device=device, seed=10 * g + i) / 2 for i, s in enumerate(shapes))
        )

    routing = None
    if given:
        index_a = draw_index(G, B, E, r, device)
        index_b = index_a if tied else draw_index(G, B, E, r, device, seed=1)
        routing = Routing(index_a, index_b, draw(G, B, r, device=device, seed=4), None, None)
    return Group(
        x=draw(B * L, D, device=device, seed=91, dtype=dtype),
        bases=[FrozenLinear(draw(O, D, device=device, dtype=dtype), None) for O in widths],
        factors=[factors(g, O) for g, O in enumerate(widths)],
        read=draw(B, W, device=device, seed=92) if task else None,
        given=routing,
        seeds=torch.arange(5, 5 + G, device=device) if dropout else None,
        instances=instances,
        options=Options(
            r, 2.5 * (keep_scale(dropout) if dropout else 1.0), dropout, gate,
            conditioning if table else None, tied, not task, dtype,
        ),
    )  # fmt: skip


def run_stages(stages, group: Group, needs: Needs = EVERYTHING, learns=True) -> dict:
    """Everything that the stages give, by name, from fixed y, dy and gradients of the routing."""
    given = group.given is not None
    needs = needs._replace(routers=needs.routers and not given, gate=needs.gate and given)
    N, G = len(group.x), len(group.factors)
    like = {"device": group.x.device, "dtype": group.x.dtype}
    widths = [own.lora_B.shape[1] for own in group.factors]
    ys, dys = ([draw(N, O, seed=n + O, **like) for O in widths] for n in (100, 200))
    routing, saved = stages.project(group)
    outs, saved = stages.expand(group, ys, [True] * G, routing, saved)
    found = {f"y{g}": y for g, y in enumerate(outs)}
    dx, drouting = draw(N, group.x.shape[1], seed=300, **like), (None, None, None)
    if learns and not given:
        real = {"device": group.x.device, "dtype": routing.gate.dtype}
        dprobs = [draw(*routing.probs_a.shape, seed=n, **real) for n in (1, 2)]
        dgate = None if group.options.gate == "binary" else draw(*routing.gate.shape, seed=3, **real)
        drouting = dgate, dprobs[0], None if group.options.tied else dprobs[1]
    dlora_B, dgate, carried = stages.expand_backward(group, dys, drouting, routing, saved, needs)
    found |= {f"lora_B{g}": d for g, d in enumerate(dlora_B)} | {"gate": dgate}
    gradients = stages.project_backward(group, dx, routing, saved, carried, needs)
    for name, value in gradients._asdict().items():
        found |= {name: value} if name in ("x", "read") else {f"{name}{g}": d for g, d in enumerate(value)}
    return routing, found
