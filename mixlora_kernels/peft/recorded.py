"""The recorded routing of each layer. The routing of a group is kept as one, and split when a layer's is read."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..routing import Routing


class Recorded(NamedTuple):
    """A layer's routing, as the routing of its group [G, B, ...] and the layer's index g in it. G may be 1."""

    routing: Routing
    g: int

    def single(self) -> Routing:
        """The layer's own routing, [B, ...]."""
        return self.routing.member(self.g)


def join(found: Sequence[Recorded]) -> Routing:
    """The routings of several layers as that of a group, [G, B, ...]."""
    routing, G = found[0].routing, len(found)
    if all(one.routing is routing and one.g == g for g, one in enumerate(found)) and len(routing.index_a) == G:
        return routing
    return Routing(*map(torch.stack, zip(*(one.single() for one in found))))


def detach(routings: dict[tuple[str, str], Recorded]) -> dict[tuple[str, str], Recorded]:
    """The same routings without their autograd graphs. The routing of a group is detached once."""
    plain = {}
    for routing, _ in routings.values():
        if id(routing) not in plain:
            plain[id(routing)] = routing.detach() if routing.gate.requires_grad else routing
    return {place: Recorded(plain[id(routing)], g) for place, (routing, g) in routings.items()}
