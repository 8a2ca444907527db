"""choose: from routers' logits to factors, exactly as the package routes. The only use of its arithmetic in serving."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.torch.route import condition_table, route
from ..config import MixLoRAConfig
from ..routing import Instances


class Choice(NamedTuple):
    """What was chosen for each of P prompts: ``index_a``, ``index_b`` [P, r] int64 and ``gate`` [P, r] float32."""

    index_a: Tensor
    index_b: Tensor
    gate: Tensor


def router_matrix(router_A: Tensor, router_B: Tensor | None) -> Tensor:
    """What a pooled mean is multiplied with for the logits: the routers as one matrix, those of A first,
    [2E, d_in] float32; [E, d_in] where there is no ``router_B``."""
    return torch.cat([router for router in (router_A, router_B) if router is not None]).float()


def table_of(lora_A: Tensor, router_AB: Tensor | None, config: MixLoRAConfig) -> Tensor | None:
    """T [r, E, E] of the conditional router, which depends on parameters alone; None without conditioning."""
    if not config.has_conditioning or router_AB is None:
        return None
    return condition_table(lora_A.float(), router_AB.float(), config.conditioning)


def choose(logits: Tensor, table: Tensor | None, config: MixLoRAConfig) -> Choice:
    """Equations 6 to 8 for P prompts.

    Args:
        logits: [P, 2E] float32 ([P, E] where pairs are tied), the pooled means [P, d_in] by ``router_matrix``.
        table: of ``table_of``.
    """
    instances = Instances(count=logits.shape[0], length=1)
    index_a, index_b, gate, *_ = route(logits, table, config.r, config.gate, instances, tied=not config.chooses_b)
    return Choice(index_a, index_b, gate)
