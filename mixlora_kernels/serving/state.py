"""The state of a fused layer: what was chosen for each running request, by the request's first KV block."""

import torch
from torch import Tensor

from .routing import Choice


class Pairs:
    """Slot i of A goes to slot i of B: a permutation, kept as indices into the G * E columns of all members.

    Args:
        members, factors, r: G, E, R.
        scale: alpha / r.
        gated: whether gates differ from 1 in the forward.
    """

    def __init__(self, members: int, factors: int, r: int, scale: float, gated: bool, device: torch.device):
        self.slots, self.scale, self.gated = members * r, scale, gated
        self.alpha = 1.0 if gated else scale  # what the product with lora_B is still to be multiplied with
        # Where a member's columns begin, [1, G, 1].
        self.offsets = (torch.arange(members, device=device) * factors).view(1, members, 1)
        self.index = torch.zeros(0, 2 * self.slots, dtype=torch.int32, device=device)
        self.weight = torch.zeros(0, self.slots if gated else 0, device=device)

    def reserve(self, blocks: int) -> None:
        """Make room for so many KV blocks; what was kept is gone."""
        self.index = self.index.new_zeros(blocks, self.index.shape[1])
        self.weight = self.weight.new_zeros(blocks, self.weight.shape[1])

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.index, self.weight))

    def write(self, blocks: Tensor, choice: Choice) -> None:
        """Keep the choices [P, G, R] of P requests whose first blocks are given, [P] int64."""
        index = [(part + self.offsets).flatten(1) for part in (choice.index_a, choice.index_b)]
        self.index[blocks] = torch.cat(index, 1).to(torch.int32)
        if self.gated:
            self.weight[blocks] = choice.gate.flatten(1) * self.scale

    def place(self, u: Tensor, blocks: Tensor) -> Tensor:
        """s / alpha [N, G * E] of u [N, G * E] for tokens whose requests' first blocks are given, [N] int64."""
        index_a, index_b = self.index.index_select(0, blocks).long().chunk(2, 1)  # [N, G * R]
        chosen = u.gather(1, index_a)
        if self.gated:  # in the weight's precision, so that no rounding of the weight biases a whole request
            chosen = (chosen * self.weight.index_select(0, blocks)).to(u.dtype)
        return torch.zeros_like(u).scatter_(1, index_b, chosen)
