"""The seven projections of a LLaMA decoder layer without what is between them, which costs every implementation alike.

On the meta device a whole decoder cannot run: its mask depends on values.
"""

import torch
from torch import Tensor, nn


class Between(torch.autograd.Function):
    """What a decoder layer computes between its projections, as autograd sees it: it launches nothing."""

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        ctx.shapes = [x.shape for x in inputs]
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return tuple(gradient.new_empty(shape) for shape in ctx.shapes)


class Block(nn.Module):
    def __init__(self, hidden: int, intermediate: int, **where):
        super().__init__()

        def linear(d_in: int, d_out: int) -> nn.Linear:
            return nn.Linear(d_in, d_out, bias=False, **where)

        self.self_attn = nn.ModuleDict(
            {name: linear(hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        )
        wide = {name: linear(hidden, intermediate) for name in ("gate_proj", "up_proj")}
        self.mlp = nn.ModuleDict(wide | {"down_proj": linear(intermediate, hidden)})

    def forward(self, x: Tensor) -> Tensor:
        attention, mlp = self.self_attn, self.mlp
        x = Between.apply(attention["q_proj"](x), attention["k_proj"](x), attention["v_proj"](x))
        x = Between.apply(attention["o_proj"](x))
        return mlp["down_proj"](Between.apply(mlp["gate_proj"](x), mlp["up_proj"](x)))


class Projections(nn.Module):
    """One layer, with the names that it has in a LLaMA, which is how PEFT finds its projections."""

    def __init__(self, hidden: int, intermediate: int, device="meta", dtype=torch.bfloat16):
        super().__init__()
        self.layers = nn.ModuleList([Block(hidden, intermediate, device=device, dtype=dtype)])

    def get_decoder(self) -> nn.Module:
        return self

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """[B, L, hidden] -> [B, L, hidden]"""
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


class OneProjection(nn.Module):
    """A single one of them, hidden -> hidden, in the place that it has in a LLaMA."""

    def __init__(self, hidden: int, device="meta", dtype=torch.bfloat16):
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        linear = nn.Linear(hidden, hidden, bias=False, device=device, dtype=dtype)
        self.layers[0].self_attn = nn.ModuleDict({"o_proj": linear})
        self.layers[0].mlp = nn.ModuleDict()

    def get_decoder(self) -> nn.Module:
        return self

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.layers[0].self_attn["o_proj"](inputs_embeds)
