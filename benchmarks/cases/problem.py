"""One layer's problem: the shapes (Case), and the tensors that every implementation is given (Problem)."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

import mixlora_kernels as mk

SHAPE = ("B", "L", "d_in", "d_out", "E", "r", "dropout")


class Shaped:
    """What every kind of case tells; a field that it does not have is None in its rows."""

    dtype: torch.dtype
    E: int
    r: int
    dropout: float = 0.0
    also: tuple[str, ...] = ()  # further attributes that rows tell

    @property
    def product(self):
        """What the frozen product depends on: cases that share it share the implementation ``base``."""
        return self

    @property
    def config(self) -> mk.MixLoRAConfig:
        return mk.MixLoRAConfig(r=self.r, num_factors=self.E, dropout=self.dropout)

    @property
    def fields(self) -> dict:
        """What a row says of its case."""
        told = {name: getattr(self, name, None) for name in (*SHAPE, *self.also)}
        return {"case": self.name, "dtype": dtype_name(self.dtype)} | told


@dataclass(frozen=True)
class Case(Shaped):
    """B instances of L tokens through a layer d_in -> d_out.

    ``kept`` marks a decoding step: no gradients, and the routing found earlier is used again. ``label`` stands in
    the place of the name.
    """

    B: int
    L: int
    d_in: int
    d_out: int
    dtype: torch.dtype = torch.float32
    E: int = 16
    r: int = 4
    dropout: float = 0.0
    kept: bool = False
    label: str | None = None

    @property
    def name(self) -> str:
        if self.label:
            return self.label
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.d_in}→{self.d_out}, {self.B}×{self.L}, {dtype_name(self.dtype)}{dropout}"

    @property
    def product(self) -> tuple:
        return self.B * self.L, self.d_in, self.d_out, self.dtype


class Problem:
    """The tensors of a case, the same for the same seed.

    Attributes:
        linear: the frozen layer, shared by all implementations, and by problems to which it is given.
        factors: ``lora_A`` [E, d_in], ``lora_B`` [E, d_out] (not zero), ``router_A``, ``router_B`` [E, d_in] and
            ``router_AB`` [r, E, d_in] by name, float32.
        x: [B, L, d_in], a leaf. dy: gradient of the output, [B, L, d_out].
        routing: what the reference chooses for x, to be kept while decoding.
    """

    def __init__(self, case: Case, device: torch.device, seed: int, linear: nn.Linear | None = None):
        torch.manual_seed(seed)
        self.case = case
        if linear is None:
            linear = nn.Linear(case.d_in, case.d_out, bias=False, device=device, dtype=case.dtype)
        self.linear = linear.requires_grad_(False)
        self.factors = draw_factors(case.d_in, case.d_out, case.config, device)
        self.x = self._draw_input(device).requires_grad_(not case.kept)
        self.dy = torch.randn(case.B, case.L, case.d_out, device=device, dtype=case.dtype)

    def _draw_input(self, device: torch.device) -> Tensor:
        """Hidden states on which every router's logits lie evenly spaced between -2 and 2, in a random order.

        Near ties would let two correct computations choose different factors, in bfloat16 above all; their results
        could not be compared.
        """
        case = self.case
        ladder = torch.linspace(-2, 2, case.E, device=device)
        wanted = torch.stack([ladder[torch.randperm(case.E, device=device)] for _ in range(2 * case.B)])
        routers = torch.cat((self.factors["router_A"], self.factors["router_B"]))  # [2E, d_in]
        mean = wanted.view(case.B, -1) @ torch.linalg.pinv(routers).T  # [B, d_in]
        noise = torch.randn(case.B, case.L, case.d_in, device=device)
        return (noise - noise.mean(dim=1, keepdim=True) + mean.unsqueeze(1)).to(case.dtype)

    @cached_property
    def routing(self) -> mk.Routing:
        """What the reference chooses for x, as what a decoding step keeps."""
        names = ("lora_A", "router_A", "router_B", "router_AB")
        factors = [self.factors[name].double() for name in names]
        pooled = self.x.detach().double().mean(dim=1)  # [B, d_in]
        chosen = [mk.reference.route(state, *factors, r=self.case.r) for state in pooled]
        index_a, index_b, gate, probs_a, probs_b = map(torch.stack, zip(*chosen))
        return mk.Routing(index_a, index_b, *(t.float() for t in (gate, probs_a, probs_b)))


def draw_factors(d_in: int, d_out: int, config: mk.MixLoRAConfig, device: torch.device) -> dict[str, Tensor]:
    """An adapter's parameters as they begin, but with a ``lora_B`` that is not zero, so that all gradients are not."""
    adapter = mk.MixLoRAAdapter(d_in, d_out, config, device=device)
    nn.init.normal_(adapter.lora_B, std=d_in**-0.5)
    return {name: parameter.detach() for name, parameter in adapter.named_parameters()}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
