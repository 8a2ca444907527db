"""Rows: compute the update of few tokens with a Triton kernel that reads only the chosen rows of their requests.

In a decoding step, each token belongs to another request, with other factors. Products with all of lora_A and lora_B
would read E rows instead of r. One launch computes all members of a fused layer, and reads the choices where they are
stored.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.select import select
from ..config import MixLoRAConfig
from .routing import Choice


def rows_of(members: int, config: MixLoRAConfig, lora_A: Tensor, backend: str | None) -> "Rows | None":
    """``Rows`` if ``select`` gives the Triton backend for ``backend`` and lora_A; else None."""
    return Rows(members, config, lora_A.device) if select(backend, lora_A).name == "triton" else None


class Rows:
    """The choices of each running request in the form that the kernel reads: [G members, KV blocks, R slots]. ``Tied``
    and ``Pairs`` keep the same choices for the products with all factors, which are used for more tokens."""

    def __init__(self, members: int, config: MixLoRAConfig, device: torch.device):
        from ..backends.kernels.decode import DECODE, MOST_PAIRS  # here, because it imports Triton

        self.most, self.decode = MOST_PAIRS // config.r, DECODE.on
        self.scale = config.scaling
        self.index_a = torch.zeros(members, 0, config.r, dtype=torch.int32, device=device)
        self.index_b = torch.zeros(members, 0, config.r, dtype=torch.int32, device=device)
        self.gate = torch.zeros(members, 0, config.r, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.index_a, self.index_b, self.gate

    def reserve(self, blocks: int) -> None:
        """Allocate state for this number of KV blocks. Earlier state is dropped."""
        G, _, R = self.gate.shape
        self.index_a, self.index_b, self.gate = (tensor.new_zeros(G, blocks, R) for tensor in self.tensors)

    def write(self, blocks: Tensor, choice: Choice) -> None:
        """Store the choices [P, G, R] of P requests at their first KV blocks, [P] int64."""
        for kept, chosen in zip(self.tensors, choice):
            kept[:, blocks] = chosen.transpose(0, 1).to(kept.dtype)

    def take(self, tokens: int) -> bool:
        """Whether to use the kernel for a step of this many tokens. It reads r rows for each token."""
        return tokens <= self.most

    def add_(
        self, ys: Sequence[Tensor], x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], blocks: Tensor
    ) -> None:
        """Add the update of x [N, D] to each member's y [N, O]. ``blocks`` [N] int64 has the first KV block of each
        token's request."""
        # The kernel takes the request's first KV block as the index of the token's instance.
        self.decode(x)(
            list(ys), x, list(lora_A), list(lora_B), self.index_a, self.index_b, self.gate, self.scale, blocks,
            self.gate.shape[1], 0,
        )  # fmt: skip
