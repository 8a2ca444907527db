"""MixLoRAConfig: what one adapter computes."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

from .fields import check_fields

RoutingInput = Literal["instance", "task", "random"]
ConditioningKind = Literal["factors", "none", "published", "tied"]
GateKind = Literal["straight_through", "binary", "weighted", "normalized"]
PooledTokens = Literal["sequence", "prompt", "all"]
DecodeRouting = Literal["prompt", "token"]

_RENAMED = {
    "Routing": "RoutingInput",
    "Conditioning": "ConditioningKind",
    "Gate": "GateKind",
    "Pool": "PooledTokens",
    "Decode": "DecodeRouting",
}


def __getattr__(name: str) -> Any:
    """The names of version 0.1.0, with a warning; the next version removes them."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]


@dataclass
class MixLoRAConfig:
    """Hyper-parameters of Conditional Mixture-of-LoRA (MixLoRA, ACL 2024).

    Args:
        r: factors chosen for each instance, 1 <= r <= num_factors.
        num_factors: size E of each of the two pools of rank-1 factors.
        alpha: numerator of ``scaling = alpha / r``; ``None`` means ``2 * num_factors`` (Appendix B).
        dropout: probability of zeroing an element of the input of ``lora_A``, 0 <= dropout < 1.
            Applied in training mode only, in steps of 2**-16, and never to what the routers read.
        routing: what the routers read. ``"instance"``: the mean of the hidden states (Equation 5);
            ``"task"``: the mean of a task embedding (Equation 10); ``"random"``: nothing, r distinct
            factors are drawn for each instance (Table 2).
        conditioning: how the choice for B depends on the factors chosen for A. ``"factors"``: Equation 7;
            ``"none"``: not at all (Figure 4); ``"published"``: the product of sums that the released
            code computes; ``"tied"``: B takes the factors of A's choice, pair by pair, and has no router.
        gate: what multiplies a chosen pair of factors. ``"straight_through"``: 1, with the gradient of
            the two probabilities that chose it; ``"binary"``: 1, and the routers stay fixed;
            ``"weighted"``: the product of the two probabilities, each renormalised over the r chosen;
            ``"normalized"``: the same with each renormalised to a mean of 1 over the r chosen. A tied
            pair was chosen by one probability, which counts once.
        pool: which tokens of a model's input an instance's mean runs over. ``"sequence"``: all that are
            not padding; ``"prompt"``: the instruction's only; ``"all"``: padding included. The
            code that builds a whole model's masks reads it; a layer by itself averages over the mask it is given.
        decode: what routes a generated token. ``"prompt"``: the routing found at prefill is kept;
            ``"token"``: every step routes anew.
        task_dim: width of the task embedding; needed by, and only by, ``routing="task"``.

    Raises:
        ValueError: a value of another type (a bool is no number, and a number is finite) or out of range, an unknown
            choice, or settings that contradict one another.
    """

    r: int = 4
    num_factors: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    routing: RoutingInput = "instance"
    conditioning: ConditioningKind = "factors"
    gate: GateKind = "straight_through"
    pool: PooledTokens = "sequence"
    decode: DecodeRouting = "prompt"
    task_dim: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("r", "num_factors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}")
        if self.r > self.num_factors:
            raise ValueError(f"r must not exceed num_factors, got r={self.r} and num_factors={self.num_factors}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        if (self.routing == "task") != (self.task_dim is not None):
            raise ValueError(
                "task_dim, the width of the task embedding, must be given with routing='task' and only then, "
                f"got routing={self.routing!r} and task_dim={self.task_dim!r}"
            )
        if self.task_dim is not None and self.task_dim < 1:
            raise ValueError(f"task_dim must be at least 1, got {self.task_dim!r}")
        if self.routing == "random" and self.gate in ("weighted", "normalized"):
            raise ValueError(
                f"gate={self.gate!r} needs the routers' probabilities, which routing='random' does not have"
            )

    @classmethod
    def published(cls, **settings: Any) -> "MixLoRAConfig":
        """What the released code computes: fixed routers, its own conditioning, padding averaged in, and
        every decoding step routed anew. ``settings`` override or add to these."""
        return cls(**{"gate": "binary", "conditioning": "published", "pool": "all", "decode": "token", **settings})

    @classmethod
    def tied(cls, **settings: Any) -> "MixLoRAConfig":
        """Pairs of factors that are chosen as one, weighted by their renormalised probabilities. It departs from the
        paper, where B chooses for itself and a chosen pair counts 1. ``settings`` override or add to these."""
        return cls(**{"conditioning": "tied", "gate": "normalized", **settings})

    @property
    def scaling(self) -> float:
        """``alpha / r``, the factor before the update in Equation 1."""
        return (2 * self.num_factors if self.alpha is None else self.alpha) / self.r

    @property
    def has_routers(self) -> bool:
        """Whether routers choose the factors; random routing has none."""
        return self.routing != "random"

    @property
    def chooses_b(self) -> bool:
        """Whether B has a choice of its own; where pairs are tied, B takes A's."""
        return self.conditioning != "tied"

    @property
    def has_conditioning(self) -> bool:
        """Whether B has a conditional router, Equation 7's ``router_AB``."""
        return self.has_routers and self.conditioning in ("factors", "published")
