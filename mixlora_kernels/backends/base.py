"""The interface between the operation and a backend.

The unit is a group of G siblings: frozen maps and adapters that read the same x. A single layer is a group of one.

Alphabet: G siblings, B instances, L tokens each, N tokens in all, D in, O out, E factors, R slots.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..routing import Instances, Routing


class FrozenLinear(NamedTuple):
    """A frozen linear map. The operation's node computes its product and adds the update to it in place."""

    weight: Tensor  # [O, D]
    bias: Tensor | None  # [O]


class Factors(NamedTuple):
    """The parameters of one adapter. A router that the configuration does not use is None."""

    lora_A: Tensor  # [E, D]
    lora_B: Tensor  # [E, O]
    router_A: Tensor | None  # [E, d_route]
    router_B: Tensor | None  # [E, d_route]
    router_AB: Tensor | None  # [R, E, D]


class Options(NamedTuple):
    """What a backend needs beside tensors."""

    r: int
    scale: float  # scaling, times the 1 / (1 - p) of dropout
    p: float  # probability of dropout
    gate: str
    conditioning: str | None  # "factors" or "published"; None: no table
    tied: bool  # whether B uses A's indices
    reads_x: bool  # whether the routers read x
    dtype: torch.dtype  # x's

    @property
    def precise(self) -> torch.dtype:
        """The dtype that routing is computed in: float32, or float64 for float64 input."""
        return torch.promote_types(self.dtype, torch.float32)


class Group(NamedTuple):
    """The input of one call of the operation.

    Attributes:
        x: the tokens [N, D].
        bases: each sibling's frozen map, or its output [N, O].
        factors: the parameters of each sibling's adapter.
        read: the routers' input [B, d_route], if it is not the mean of x.
        given: a routing to use, with tensors [G, B, ...]; None: choose the factors.
        seeds: the seeds of dropout [G] int64, or None.
        instances: how the N tokens divide into B instances.
        options: what to compute.

    All tensors but x, the bases' and the factors' are contiguous.
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
    """Which gradients are needed."""

    x: bool
    lora_A: bool
    lora_B: bool
    routers: bool  # of all routers, and in task routing also of their input
    gate: bool  # of a given gate; a computed gate passes its gradient on to the routers


class Gradients(NamedTuple):
    """The result of ``project_backward``. A gradient that is not needed is None."""

    x: Tensor | None  # [N, D]
    lora_A: Sequence[Tensor | None]  # one for each sibling, as for the routers
    router_A: Sequence[Tensor | None]
    router_B: Sequence[Tensor | None]
    router_AB: Sequence[Tensor | None]
    read: Tensor | None  # [B, d_route]


class Backend(Protocol):
    """An implementation of the operation."""

    name: str

    def apply(self, group: Group) -> tuple[Sequence[Tensor], Routing]:
        """Compute Equations 1 and 5 to 9 for a group, with gradients.

        Returns:
            Each sibling's y [N, O], and the routing with tensors [G, B, ...].
        """

    def decodes(self, group: Group) -> bool:
        """Whether the operation should call ``decode`` for a group of this size."""

    def decode(self, group: Group) -> Sequence[Tensor]:
        """Compute each sibling's y [N, O] for a given routing, without dropout and without a backward."""


# What a stage passes to later stages: tensors or None, in an order that only the backend knows.
Saved = tuple[Any, ...]
DRouting = tuple[Tensor | None, Tensor | None, Tensor | None]  # the gradients of gate, p_A and p_B


class Stages(Protocol):
    """The operation as two stages, with the frozen products between them, and each stage's backward.

    ``project`` reads x: it chooses the factors (Equations 5 to 8), and multiplies x by the chosen rows of lora_A.
    ``expand`` weights the chosen rows of lora_B with these products and adds them (Equations 1 and 9). ``node.py``
    calls the stages. A given routing reaches them without its probabilities, which are None.

    Attributes:
        writes_first: whether ``expand`` and ``project_backward`` run before the frozen products, which are then added
            to their results. False: the frozen products run first, and at ``lora_B = 0`` the layer has the bits of the
            frozen one.
    """

    writes_first: bool

    def project(self, group: Group) -> tuple[Routing, Saved]:
        """Return the routing with tensors [G, B, ...], and what the later stages need."""

    def expand(
        self, group: Group, ys: Sequence[Tensor] | None, fresh: Sequence[bool], routing: Routing, saved: Saved
    ) -> tuple[Sequence[Tensor], Saved]:
        """Add the update to each frozen output y [N, O]: in place if it is ``fresh``, else to a copy. If ``ys`` is
        None, return the updates alone. Also return what the backward needs beside the routing."""

    def expand_backward(
        self, group: Group, dys: Sequence[Tensor], drouting: DRouting,
        routing: Routing, saved: Saved, needs: Needs,
    ) -> tuple[Sequence[Tensor | None], Tensor | None, Saved]:  # fmt: skip
        """Return the gradient of each lora_B, the gradient of a given gate [G, B, R] if it is needed, and what
        ``project_backward`` needs.

        Args:
            dys: the gradients of each y [N, O].
            drouting: the gradients of the routing that ``project`` returned, of its gate [G, B, R], p_A and p_B
                [G, B, E]; None for those without one.
        """

    def project_backward(
        self, group: Group, dx: Tensor | None, routing: Routing, saved: Saved, carried: Saved, needs: Needs
    ) -> Gradients:
        """Return the other gradients.

        Args:
            dx: x's gradient through the frozen maps, or None. The adapters' gradient is added to it in place.
            carried: the last result of ``expand_backward``.
        """
