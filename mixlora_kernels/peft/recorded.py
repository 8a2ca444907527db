"""What each layer of a forward chose, as it is kept: a group's routing stays whole until a layer's is asked for."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..routing import Routing


class Recorded(NamedTuple):
    """What a layer chose: the routing of its group [G, B, ...], be it of one, and the layer's place g there."""

    routing: Routing
    g: int

    def single(self) -> Routing:
        """The layer's own, [B, ...]."""
        return self.routing.member(self.g)


def join(found: Sequence[Recorded]) -> Routing:
    """The routing of several layers as a group's, [G, B, ...]."""
    routing, G = found[0].routing, len(found)
    if all(one.routing is routing and one.g == g for g, one in enumerate(found)) and len(routing.index_a) == G:
        return routing
    return Routing(*map(torch.stack, zip(*(one.single() for one in found))))


def detach(routings: dict[tuple[str, str], Recorded]) -> dict[tuple[str, str], Recorded]:
    """The same without their graphs; that of a group is detached once."""
    plain = {}
    for routing, _ in routings.values():
        if id(routing) not in plain:
            plain[id(routing)] = routing.detach() if routing.gate.requires_grad else routing
    return {place: Recorded(plain[id(routing)], g) for place, (routing, g) in routings.items()}
