"""What the operation and a backend say to one another.

The unit is a group of G siblings: frozen maps and adapters that read the same x. A single layer is a group of one.

Alphabet: G siblings, B instances, L tokens each, N tokens in all, D in, O out, E factors, R slots.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..routing import Instances, Routing


class FrozenLinear(NamedTuple):
    """A frozen product that may run inside the operation's node, where the update is added in place."""

    weight: Tensor  # [O, D]
    bias: Tensor | None  # [O]


class Factors(NamedTuple):
    """The parameters of one adapter, or their gradients; a router is None where the configuration has none."""

    lora_A: Tensor  # [E, D]
    lora_B: Tensor  # [E, O]
    router_A: Tensor | None  # [E, d_route]
    router_B: Tensor | None  # [E, d_route]
    router_AB: Tensor | None  # [R, E, D]


class Options(NamedTuple):
    """What a backend needs to know beside tensors."""

    r: int
    scale: float  # scaling, and the 1 / (1 - p) of dropout
    p: float
    gate: str
    conditioning: str | None  # "factors" or "published"; None: no table
    tied: bool  # whether B takes A's choice
    reads_x: bool  # whether the routers read x
    dtype: torch.dtype  # x's

    @property
    def precise(self) -> torch.dtype:
        """What routing is computed in: float32, or float64 for float64 input."""
        return torch.promote_types(self.dtype, torch.float32)


class Group(NamedTuple):
    """What one call of the operation works on.

    Attributes:
        x: the tokens [N, D].
        bases: of each sibling the frozen map, or its output [N, O].
        factors: of each sibling its adapter's parameters.
        read: what the routers read where that is not x, [B, d_route].
        given: a routing to use, its tensors [G, B, ...]; None: factors are to be chosen.
        seeds: dropout's [G] int64, or None.
        instances: how the tokens divide.
        options: what to compute.
    """

    x: Tensor
    bases: Sequence[FrozenLinear | Tensor]
    factors: Sequence[Factors]
    read: Tensor | None
    given: Routing | None
    seeds: Tensor | None
    instances: Instances
    options: Options


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    lora_A: bool
    lora_B: bool
    routers: bool  # all of them, and what they read in task routing
    gate: bool  # a given one; the gradient of a gate that was computed goes on to the routers


class Gradients(NamedTuple):
    """What ``project_backward`` returns; None where not needed."""

    x: Tensor | None  # [N, D]
    lora_A: Sequence[Tensor | None]  # of each sibling, as are the routers'
    router_A: Sequence[Tensor | None]
    router_B: Sequence[Tensor | None]
    router_AB: Sequence[Tensor | None]
    read: Tensor | None  # [B, d_route]


class Backend(Protocol):
    """A way to compute the operation."""

    name: str

    def apply(self, group: Group) -> tuple[Sequence[Tensor], Routing]:
        """Equations 1 and 5 to 9 for a group, differentiable: each sibling's y [N, O], and what was chosen, its tensors
        [G, B, ...], or None for the probabilities of a given routing."""

    def decodes(self, group: Group) -> bool:
        """Whether ``decode`` is meant for a group of so few tokens."""

    def decode(self, group: Group) -> Sequence[Tensor]:
        """Each sibling's y [N, O] for a given routing, without dropout and without a backward."""


# What a stage hands to later ones: tensors, or None. Only the backend knows which stands where.
Saved = tuple[Any, ...]
DRouting = tuple[Tensor | None, Tensor | None, Tensor | None]  # the gradients of gate, p_A and p_B


class Stages(Protocol):
    """The operation as two stages, with the frozen products between them, and each stage's backward.

    ``project`` reads x: it chooses the factors (Equations 5 to 8) and takes the products with the chosen rows of
    lora_A. ``expand`` adds their combination of the chosen rows of lora_B (Equations 1 and 9). ``node.py`` calls them.

    Attributes:
        writes_first: whether ``expand`` and ``project_backward`` may run before the frozen products, which then
            accumulate onto what they wrote. False: the products run first, and at ``lora_B = 0`` the layer has the
            bits of the frozen one.
    """

    writes_first: bool

    def project(self, group: Group) -> tuple[Routing, Saved]:
        """The routing, its tensors [G, B, ...], and what the later stages need."""

    def expand(
        self, group: Group, ys: Sequence[Tensor] | None, fresh: Sequence[bool], routing: Routing, saved: Saved
    ) -> tuple[Sequence[Tensor], Saved]:
        """Add the update to each frozen output y [N, O], in place where it is ``fresh``, or return it by itself where
        there are none; and what the backward needs beside the routing."""

    def expand_backward(
        self, group: Group, dys: Sequence[Tensor], drouting: DRouting,
        routing: Routing, saved: Saved, needs: Needs,
    ) -> tuple[Sequence[Tensor | None], Tensor | None, Saved]:  # fmt: skip
        """The gradients of each lora_B; of a given gate [G, B, R], where it is needed; and what ``project_backward``
        needs.

        Args:
            dys: y's gradients [N, O].
            drouting: the gradients of the gate [G, B, R], of p_A and of p_B [G, B, E] as what ``project`` returned;
                None where there is none.
        """

    def project_backward(
        self, group: Group, dx: Tensor | None, routing: Routing, saved: Saved, carried: Saved, needs: Needs
    ) -> Gradients:
        """The other gradients.

        Args:
            dx: x's gradient through the frozen maps, to which the adapters' is added in place; None: there is none.
            carried: what ``expand_backward`` left.
        """
