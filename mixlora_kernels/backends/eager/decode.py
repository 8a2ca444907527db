"""decode: the update for a given routing, without gradients, in as few torch operations as possible. For a step of a
few tokens, starting the operations takes most of the time."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...frozen import frozen_product
from ..base import FrozenLinear, Group


def decode(group: Group) -> Sequence[Tensor]:
    """``Backend.decode``."""
    x, instances, dtype, scale = group.x, group.instances, group.options.dtype, group.options.scale
    if group.given is None:
        raise ValueError("decode needs a given routing, got none")
    index_a, index_b, gate, *_ = group.given
    u = torch.stack([F.linear(x, factors.lora_A.to(dtype)) for factors in group.factors])  # [G, N, E]
    if instances.length != 1:  # repeated for each token
        index_a, index_b, gate = (t[:, instances.instance_of_token(x.device)] for t in (index_a, index_b, gate))
    s = torch.zeros_like(u).scatter_add_(-1, index_b, (u.gather(-1, index_a) * gate).to(dtype))
    ys = []
    for g, (base, factors) in enumerate(zip(group.bases, group.factors)):
        lora_B = factors.lora_B.to(dtype)
        if isinstance(base, FrozenLinear):
            ys.append(frozen_product(x, *base).addmm_(s[g], lora_B, alpha=scale))
        elif base.dtype is dtype:
            ys.append(torch.addmm(base, s[g], lora_B, alpha=scale))
        else:
            ys.append(base.add(s[g] @ lora_B, alpha=scale).to(base.dtype))
    return ys
