"""Choose factors from the routers' logits, with the functions of the torch backend."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.eager.route import choose_factors, condition_table, router_logits
from ..config import MixLoRAConfig


class Choice(NamedTuple):
    """The factors chosen for each of P prompts: ``index_a``, ``index_b`` [P, r] int64, and ``gate`` [P, r] float32."""

    index_a: Tensor
    index_b: Tensor
    gate: Tensor


def router_matrix(router_A: Tensor, router_B: Tensor | None) -> Tensor:
    """The routers as one matrix, A's first: [2E, d_in] float32, or [E, d_in] without ``router_B``. Its product with a
    mean of tokens gives the logits."""
    return torch.cat([router for router in (router_A, router_B) if router is not None]).float()


def table_of(lora_A: Tensor, router_AB: Tensor | None, config: MixLoRAConfig) -> Tensor | None:
    """The table T [r, E, E] of the conditional router; None without conditioning."""
    if not config.has_conditioning or router_AB is None:
        return None
    return condition_table(lora_A.float(), router_AB.float(), config.conditioning)


def logits_of(pooled: Tensor, routers: Tensor, config: MixLoRAConfig) -> Tensor:
    """The logits [P, 2E], or [P, E] for tied pairs, from means [P, d_in] float32 and the ``router_matrix``."""
    parts = routers.chunk(2) if config.chooses_b else (routers,)
    return torch.cat([router_logits(pooled, part) for part in parts], 1)


def choose(logits: Tensor, table: Tensor | None, config: MixLoRAConfig) -> Choice:
    """Equations 6 to 8 for P prompts.

    Args:
        logits: the result of ``logits_of``, [P, 2E] or [P, E] float32.
        table: the result of ``table_of``.
    """
    logits = logits.unsqueeze(0)  # of one sibling
    logits_a, logits_b = (logits, None) if not config.chooses_b else logits.chunk(2, -1)
    tables = None if table is None else table.unsqueeze(0)
    routing, _ = choose_factors(logits_a, logits_b, tables, config.r, config.gate)
    return Choice(*routing.member(0)[:3])
