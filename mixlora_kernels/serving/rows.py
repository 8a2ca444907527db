"""Rows: the update of few tokens by a Triton kernel that reads no more than their requests' chosen rows.

A step that decodes has a token of each request, and every request has factors of its own: products with all of lora_A
and lora_B would read E rows where r are wanted. One launch serves all members of a fused layer, and takes the choices
from where they are kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.select import select
from ..config import MixLoRAConfig
from .routing import Choice


def rows_of(members: int, config: MixLoRAConfig, lora_A: Tensor, backend: str | None) -> "Rows | None":
    """``Rows`` where the backend is Triton's; None otherwise. ``backend`` is chosen as everywhere: None is the best one
    for a tensor like lora_A."""
    return Rows(members, config, lora_A.device) if select(backend, lora_A).name == "triton" else None


class Rows:
    """What was chosen for each running request, as the kernel reads it: for G members, by a request's first KV block,
    R slots. ``Tied`` and ``Pairs`` keep the same for the products with all factors, which serve more tokens."""

    def __init__(self, members: int, config: MixLoRAConfig, device: torch.device):
        from ..backends.kernels.decode import MOST_PAIRS, decode_op  # imports Triton, which is not needed before

        self.most, self.decode = MOST_PAIRS // config.r, decode_op
        self.scale = config.scaling
        self.index_a = torch.zeros(members, 0, config.r, dtype=torch.int32, device=device)
        self.index_b = torch.zeros(members, 0, config.r, dtype=torch.int32, device=device)
        self.gate = torch.zeros(members, 0, config.r, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.index_a, self.index_b, self.gate

    def reserve(self, blocks: int) -> None:
        """Make room for so many KV blocks; what was kept is gone."""
        G, _, R = self.gate.shape
        self.index_a, self.index_b, self.gate = (tensor.new_zeros(G, blocks, R) for tensor in self.tensors)

    def write(self, blocks: Tensor, choice: Choice) -> None:
        """Keep the choices [P, G, R] of P requests whose first blocks are given, [P] int64."""
        for kept, chosen in zip(self.tensors, choice):
            kept[:, blocks] = chosen.transpose(0, 1).to(kept.dtype)

    def take(self, tokens: int) -> bool:
        """Whether a step of so many tokens is one for the kernel: it reads r rows again for each."""
        return tokens <= self.most

    def add_(
        self, ys: Sequence[Tensor], x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], blocks: Tensor
    ) -> None:
        """Add the update of x [N, D] to each member's y [N, O], for tokens whose requests' first blocks are given, [N]
        int64."""
        # A request's first block stands for the instance whose routing a token has.
        self.decode(
            list(ys), x, list(lora_A), list(lora_B), self.index_a, self.index_b, self.gate, self.scale, blocks,
            self.gate.shape[1], 0,
        )  # fmt: skip
