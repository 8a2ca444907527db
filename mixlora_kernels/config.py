"""MixLoRAConfig: what one adapter computes."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from .fields import check_fields

RoutingInput = Literal["instance", "task", "random"]
ConditioningKind = Literal["factors", "none", "published", "tied"]
GateKind = Literal["straight_through", "binary", "weighted", "normalized"]
PooledTokens = Literal["sequence", "prompt", "text", "all"]
DecodeRouting = Literal["prompt", "token"]

_RENAMED = {
    "Routing": "RoutingInput",
    "Conditioning": "ConditioningKind",
    "Gate": "GateKind",
    "Pool": "PooledTokens",
    "Decode": "DecodeRouting",
}


def __getattr__(name: str) -> Any:
    """Return what a name of version 0.1.0 is called now, with a warning. The next version removes the old names."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]


Config = TypeVar("Config", bound="MixLoRAConfig")


@dataclass
class MixLoRAConfig:
    """Hyper-parameters of Conditional Mixture-of-LoRA (MixLoRA, ACL 2024).

    Args:
        r: number of factors chosen for each instance, 1 <= r <= num_factors.
        num_factors: size E of each of the two pools of rank-1 factors.
        alpha: numerator of ``scaling = alpha / r``; ``None`` means ``2 * num_factors`` (Appendix B).
        dropout: probability of zeroing an element of the input of ``lora_A``, 0 <= dropout < 1.
            It applies in training mode only, never to what the routers read. p is rounded to a multiple of 2**-16.
        routing: what the routers read. ``"instance"``: the mean of the hidden states (Equation 5);
            ``"task"``: the mean of a task embedding (Equation 10); ``"random"``: nothing, r distinct
            factors are drawn for each instance (Table 2).
        conditioning: how the choice for B depends on the factors chosen for A. ``"factors"``: Equation 7;
            ``"none"``: not at all (Figure 4); ``"published"``: the product of sums that the released
            code computes; ``"tied"``: B uses the indices chosen for A, and has no router.
        gate: the factor that multiplies a chosen pair. ``"straight_through"``: 1 in the forward, and the
            gradient of both probabilities in the backward; ``"binary"``: 1, and the routers stay fixed;
            ``"weighted"``: the product of both probabilities, each renormalised to a sum of 1 over the r chosen;
            ``"normalized"``: the same product, each renormalised to a mean of 1 over the r chosen. A tied
            pair has one probability, which counts once.
        pool: which tokens of a model's input an instance's mean runs over. ``"sequence"``: all tokens but
            padding; ``"prompt"``: the instruction's tokens only, with those of its images; ``"text"``: the same without
            the images' tokens; ``"all"``: all tokens, padding included. The code that builds the masks of a whole model
            reads this setting. A single layer averages over the mask it gets.
        decode: what routes a generated token. ``"prompt"``: the routing of the prompt, found at prefill;
            ``"token"``: each decoding step routes anew.
        task_dim: width of the task embedding. ``routing="task"`` needs it, and no other routing takes it.
        balance: weight of the load-balancing loss (``mixlora_kernels.balance_loss``) in the training of a whole model,
            at least 0. It keeps the routers from choosing few of the factors. A single layer does not add it.

    Raises:
        ValueError: a value has the wrong type (a bool is not a number), is not finite or is out of range; a choice is
            unknown; or two settings contradict each other.
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
    balance: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("r", "num_factors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {getattr(self, name)!r}")
        if self.r > self.num_factors:
            raise ValueError(f"r must not exceed num_factors, got r={self.r} and num_factors={self.num_factors}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        if self.balance < 0.0:
            raise ValueError(f"balance must be at least 0, got {self.balance!r}")
        if self.balance and (self.routing == "random" or self.gate == "binary"):
            raise ValueError(
                f"balance={self.balance!r} needs routers that are trained, which routing={self.routing!r} with "
                f"gate={self.gate!r} does not have: set balance=0"
            )
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
        """The configuration that computes what the released code computes: fixed routers, its own conditioning, padding
        in the mean, and routing anew in each decoding step. ``settings`` override these settings or add to them."""
        return cls(**{"gate": "binary", "conditioning": "published", "pool": "all", "decode": "token", **settings})

    @classmethod
    def tied(cls: type[Config], **settings: Any) -> Config:
        """Tied pairs with the normalized gate: the router chooses the pair (a_e, b_e) as one, and its renormalised
        probability weights it. This departs from the paper, where B has a router of its own and the gate is 1.
        ``settings`` override these settings or add to them."""
        return cls(**{"conditioning": "tied", "gate": "normalized", **settings})

    @property
    def scaling(self) -> float:
        """``alpha / r``, which multiplies the update in Equation 1."""
        return (2 * self.num_factors if self.alpha is None else self.alpha) / self.r

    @property
    def has_routers(self) -> bool:
        """Whether routers choose the factors. Random routing has no routers."""
        return self.routing != "random"

    @property
    def chooses_b(self) -> bool:
        """Whether factors of B are chosen separately. Tied pairs use A's indices for B."""
        return self.conditioning != "tied"

    @property
    def has_conditioning(self) -> bool:
        """Whether the adapter has the conditional router of Equation 7, ``router_AB``."""
        return self.has_routers and self.conditioning in ("factors", "published")
