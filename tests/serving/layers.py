"""Fused layers as vLLM would hold them, without vLLM, and steps of requests through them."""

import numpy as np
import torch
import torch.nn.functional as F

import mixlora_kernels as mk
from mixlora_kernels.serving.batch import Batch
from mixlora_kernels.serving.layer import Member, ServedLayer
from mixlora_kernels.serving.op import update_

D_IN, D_OUTS, TOKENS, BLOCKS = 12, (10, 6, 6), 64, 16
WHOLE = slice(None)

#: Every mode that is served: conditioning x gate.
MODES = [
    {"conditioning": conditioning, "gate": gate}
    for conditioning in ("factors", "none", "published", "tied")
    for gate in ("straight_through", "binary", "weighted", "normalized")
]


def mode_id(mode: dict) -> str:
    return "-".join(mode.values())


def make_parameters(config: mk.MixLoRAConfig, d_outs=D_OUTS, d_in=D_IN, seed=0) -> list[dict[str, torch.Tensor]]:
    """The parameters of the members of a fused layer, all away from zero."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(parameter.shape, generator=generator)
            for name, parameter in mk.MixLoRAAdapter(d_in, d_out, config).named_parameters()
        }
        for d_out in d_outs
    ]


def make_served(
    config: mk.MixLoRAConfig, parameters: list[dict], *, group=None, columns=WHOLE, backend=None, media=()
) -> ServedLayer:
    stops = torch.tensor([p["lora_B"].shape[1] for p in parameters]).cumsum(0).tolist()
    members = [
        Member(f"member{i}", stop - p["lora_B"].shape[1], stop, WHOLE, columns)
        for i, (stop, p) in enumerate(zip(stops, parameters))
    ]
    device = torch.device("cpu")
    layer = ServedLayer(
        members, parameters, config, Batch(TOKENS, device, media), dtype=torch.float32, device=device, group=group,
        backend=backend,
    )  # fmt: skip
    layer.reserve(BLOCKS)
    return layer


class Request:
    """A request's hidden states [tokens, D_IN], the length of its prompt, its first KV block, and its tokens' ids."""

    def __init__(self, prompt: int, generated: int, block: int, seed: int):
        self.x = torch.randn(prompt + generated, D_IN, generator=torch.Generator().manual_seed(seed))
        self.ids = np.ones(prompt + generated, dtype=np.int64)
        self.prompt, self.block, self.computed = prompt, block, 0


def step(layer: ServedLayer, requests: list[tuple[Request, int]]) -> list[torch.Tensor]:
    """Run a step that computes so many tokens of each request; what the adapter adds, for each."""
    pieces = [request.x[request.computed : request.computed + tokens] for request, tokens in requests]
    lengths = np.array([tokens for _, tokens in requests])
    layer.batch.begin(
        starts=np.concatenate(([0], lengths.cumsum())),
        computed=np.array([request.computed for request, _ in requests]),
        prompt_lengths=np.array([request.prompt for request, _ in requests]),
        first_blocks=torch.tensor([request.block for request, _ in requests]),
        ids=np.stack([np.resize(request.ids, TOKENS) for request, _ in requests]),  # rows of one length, as vLLM's are
    )
    x = torch.cat(pieces)
    y = torch.zeros(len(x), layer.members[-1].stop)
    update_(y, x, layer, layer.batch)
    layer.batch.end()
    for request, tokens in requests:
        request.computed += tokens
    return list(y.split(lengths.tolist()))


def alone(
    request: Request, config: mk.MixLoRAConfig, parameters: list[dict], media=()
) -> tuple[torch.Tensor, list[mk.Routing]]:
    """What the package adds to the request's tokens, routed by its prompt, and the routing of each member."""
    added, routings = [], []
    mask = (torch.arange(len(request.x)) < request.prompt) & torch.from_numpy(~np.isin(request.ids, media))
    for p in parameters:
        factors = mk.Factors(*(p.get(name) for name in mk.Factors._fields))
        base = F.linear(request.x, torch.zeros(p["lora_B"].shape[1], D_IN))
        y, routing = mk.mixlora(request.x, base, factors, config, mk.RoutingContext(mask=mask), backend="torch")
        added.append(y)
        routings.append(routing)
    return torch.cat(added, 1), routings
