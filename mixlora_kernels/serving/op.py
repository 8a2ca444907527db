"""The operation ``mixlora::serve``: the update of one fused layer, for every token of a step.

    each new prompt:     pooled = mean of x over the prompt's tokens, or its text → logits → choice → state[first block]
    each token t:        u = x · lora_Aᵀ     (index_a, index_b, weight) = state[block of t]
                         s[index_b] = weight · u[index_a]          y += s · lora_B

Alphabet: N tokens, P prompts, G members fused in the layer (q, k, v), E factors and R slots each, D in, O out.

A graph sees an opaque operation that reads x and writes y. When the graph runs, the operation finds everything else by
the layer's name in vLLM's forward context, as vLLM's attention operation finds its cache.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from .batch import Batch, Prompt
from .routing import Choice, choose, logits_of

if TYPE_CHECKING:
    from .layer import ServedLayer

NAME = "mixlora::serve"


def update_(y: Tensor, x: Tensor, layer: "ServedLayer", batch: Batch) -> None:
    """Add the update of x [N, D] to y [N, O], in which the members' outputs are side by side.

    Args:
        layer: the layer. The choices of new prompts are stored in its state.
        batch: the running step.
    """
    if batch.prompts:
        route_(x, layer, batch.prompts, batch.prompt_blocks)
    blocks = batch.blocks[: x.shape[0]]
    ys = [y[:, member.start : member.stop] for member in layer.members]
    if layer.rows is not None and layer.rows.take(x.shape[0]):
        layer.rows.add_(ys, x, layer.lora_A.chunk(len(ys)), layer.lora_B, blocks)
        return
    u = F.linear(x, layer.lora_A)  # [N, G * E]
    s = layer.state.place(u, blocks).to(y.dtype)  # [N, G * E]
    for y_member, s_member, lora_B in zip(ys, s.chunk(len(ys), 1), layer.lora_B):
        y_member.addmm_(s_member, lora_B, alpha=layer.state.alpha)


def route_(x: Tensor, layer: "ServedLayer", prompts: list[Prompt], blocks: Tensor) -> None:
    """Choose the factors of P prompts from their tokens in x [N, D], and store them in the layer's state at the first
    KV blocks [P] of their requests."""
    # Each prompt is summed alone, so that the bits of its sum do not depend on the other prompts.
    pooled = torch.stack([mean_of(x[p.start : p.start + p.length], p.pooled) for p in prompts])  # [P, D]
    logits = [logits_of(pooled, routers, layer.config) for routers in layer.routers]
    if layer.group is not None:  # each process has a part of D
        logits = list(all_reduce(torch.cat(logits, 1), layer.group).chunk(len(logits), 1))
    choices = [choose(part, table, layer.config) for part, table in zip(logits, layer.tables)]
    layer.write(blocks, Choice(*(torch.stack(parts, 1) for parts in zip(*choices))))  # [P, G, R] each


def mean_of(x: Tensor, pooled: Tensor | None) -> Tensor:
    """The mean of one prompt's tokens [L, D], or of those in ``pooled`` [L] bool, in float32: [D]."""
    x = x if pooled is None else x[pooled]
    return x.sum(0, dtype=torch.float32) * (1.0 / len(x))


def all_reduce(tensor: Tensor, group: str) -> Tensor:
    """Sum a tensor over the processes of a group, given by its name."""
    summed = collectives.all_reduce(tensor.contiguous(), "sum", group)  # type: ignore[arg-type]  # a name is accepted
    return collectives.wait_tensor(summed)


def serve(y: Tensor, x: Tensor, name: str) -> None:
    from vllm.forward_context import get_forward_context

    layer = get_forward_context().no_compile_layers[name]
    if layer.batch.active:
        update_(y, x, layer, layer.batch)


LIBRARY = torch.library.Library("mixlora", "FRAGMENT")
LIBRARY.define("serve(Tensor(a!) y, Tensor x, str name) -> ()")
LIBRARY.impl("serve", serve, "CompositeExplicitAutograd")


@torch.library.register_fake(NAME, lib=LIBRARY)
def _serve_fake(y: Tensor, x: Tensor, name: str) -> None:
    return None
