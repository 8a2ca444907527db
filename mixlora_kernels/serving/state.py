"""The state of a fused layer: the factors chosen for each running request, at the index of its first KV block.

Alphabet: P prompts, N tokens, G members of the layer, E factors and R slots each. The members' columns are side by
    side,
G * E in all.
"""

import torch
from torch import Tensor

from ..config import MixLoRAConfig
from .routing import Choice


def state_of(members: int, config: MixLoRAConfig, device: torch.device) -> "Tied | Pairs":
    return (Pairs if config.chooses_b else Tied)(members, config, device)


class Tied:
    """The choices of tied pairs. s has the columns of u, each times a weight that is 0 if the factor was not chosen.
    s still has to be multiplied by ``alpha``."""

    def __init__(self, members: int, config: MixLoRAConfig, device: torch.device):
        self.factors, self.scale, self.alpha = config.num_factors, config.scaling, 1.0
        self.weight = torch.zeros(0, members * config.num_factors, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def reserve(self, blocks: int) -> None:
        """Allocate state for this number of KV blocks. Earlier state is dropped."""
        self.weight = self.weight.new_zeros(blocks, self.weight.shape[1])

    def write(self, blocks: Tensor, choice: Choice) -> None:
        """Store the choices [P, G, R] of P requests at their first KV blocks, [P] int64."""
        P, G, _ = choice.gate.shape
        weight = self.weight.new_zeros(P, G, self.factors).scatter_(2, choice.index_a, choice.gate * self.scale)
        self.weight[blocks] = weight.flatten(1)

    def place(self, u: Tensor, blocks: Tensor) -> Tensor:
        """Compute s [N, G * E] from u [N, G * E]. ``blocks`` [N] int64 has the first KV block of each token's
        request."""
        # In the weight's precision: a rounded weight would shift all tokens of a request in the same direction.
        return (u * self.weight.index_select(0, blocks)).to(u.dtype)


class Pairs:
    """The choices of A and B, stored as columns of u and s: slot i of A goes to slot i of B. ``alpha`` as in
    ``Tied``."""

    def __init__(self, members: int, config: MixLoRAConfig, device: torch.device):
        slots, self.scale = members * config.r, config.scaling
        self.gated = config.gate not in ("straight_through", "binary")  # whose gate is 1 in the forward
        self.alpha = 1.0 if self.gated else self.scale
        # The first column of each member, [1, G, 1].
        self.offsets = (torch.arange(members, device=device) * config.num_factors).view(1, members, 1)
        self.index = torch.zeros(0, 2 * slots, dtype=torch.int32, device=device)
        self.weight = torch.zeros(0, slots if self.gated else 0, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.index, self.weight

    def reserve(self, blocks: int) -> None:
        """As in ``Tied``."""
        self.index = self.index.new_zeros(blocks, self.index.shape[1])
        self.weight = self.weight.new_zeros(blocks, self.weight.shape[1])

    def write(self, blocks: Tensor, choice: Choice) -> None:
        """As in ``Tied``."""
        index = [(part + self.offsets).flatten(1) for part in (choice.index_a, choice.index_b)]
        self.index[blocks] = torch.cat(index, 1).to(torch.int32)
        if self.gated:
            self.weight[blocks] = choice.gate.flatten(1) * self.scale

    def place(self, u: Tensor, blocks: Tensor) -> Tensor:
        """As in ``Tied``."""
        index_a, index_b = self.index.index_select(0, blocks).long().chunk(2, 1)  # [N, G * R]
        chosen = u.gather(1, index_a)
        if self.gated:
            chosen = (chosen * self.weight.index_select(0, blocks)).to(u.dtype)
        return torch.zeros_like(u).scatter_(1, index_b, chosen)
