"""The load-balancing loss: it keeps the routers from choosing few of the factors for every instance."""

import torch
from torch import Tensor

from .routing import Routing


def balance_loss(routing: Routing) -> Tensor:
    """The load-balancing loss of the Switch Transformer (Fedus et al. 2021, Equations 4 to 6), for top-r routing.

        E Σ_e f_e P_e,    f_e: the part of all choices that fell on factor e,    P_e: the mean probability of e

    The means run over the instances of a batch, so the batch should have several of different kinds. The loss is 1 if
    all factors are chosen equally often with equal probabilities. Its gradient reaches the routers through P.

    Args:
        routing: the ``Routing`` of B instances, or of G siblings with tensors [G, B, ...]. p_IFS + p_CFS, which sums to
            2, is halved.

    Returns:
        A scalar, the mean over the siblings, and over the pools of A and B if B was chosen separately.
    """
    pools = [(routing.index_a, routing.probs_a)]
    if routing.index_b is not routing.index_a:
        pools.append((routing.index_b, routing.probs_b / routing.probs_b.sum(-1, keepdim=True)))
    return torch.stack([_of_pool(index, probs) for index, probs in pools]).mean()


def _of_pool(index: Tensor, probs: Tensor) -> Tensor:
    chosen = torch.zeros_like(probs).scatter_(-1, index, 1.0 / index.shape[-1])  # [..., B, E]
    return probs.shape[-1] * (chosen.mean(-2) * probs.mean(-2)).sum(-1).mean()
