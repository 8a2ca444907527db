"""The implementations that are compared, under the names they have in the results: ``IMPLEMENTATIONS``.

To add one, add an entry there, and its name to those of a suite that is not for all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import mixlora_kernels as mk

from .problem import Problem


class Unavailable(RuntimeError):
    """This implementation cannot run here; the message says why."""


class Gathering(nn.Module):
    """What ``Eager`` and ``Published`` have in common: the frozen layer and the adapter's parameters."""

    def __init__(self, base: nn.Module, config: mk.MixLoRAConfig, factors: dict[str, Tensor]):
        super().__init__()
        self.base_layer, self.r, self.scaling, self.p = base, config.r, config.scaling, config.dropout
        for name, value in factors.items():
            self.register_parameter(name, self.parameter(name, value))

    def parameter(self, name: str, value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.clone())


class Eager(Gathering):
    """MixLoRA as one writes it first: the chosen factors gathered to [B, r, d], then two batched products."""

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """index_a, index_b [B, r] and the gate, 1 with the gradient of both probabilities."""
        pooled = x.mean(dim=1).to(self.router_A.dtype)
        p_a = torch.softmax(pooled @ self.router_A.T, -1)
        index_a = p_a.argsort(dim=-1, descending=True, stable=True)[:, : self.r]
        logits = torch.einsum("bid,ied->bie", self.lora_A[index_a], self.router_AB)
        p_cfs = torch.softmax(torch.softmax(logits, -1).sum(dim=1), -1)
        p_b = torch.softmax(pooled @ self.router_B.T, -1) + p_cfs
        index_b = p_b.argsort(dim=-1, descending=True, stable=True)[:, : self.r]
        learned = p_a.gather(-1, index_a) + p_b.gather(-1, index_b)
        return index_a, index_b, 1 + learned - learned.detach()

    def forward(self, x: Tensor, context: mk.RoutingContext | None = None, return_routing: bool = False):
        """As ``MixLoRALinear``'s, with no more of the context than a kept routing."""
        routing = context.routing if context else mk.Routing(*self.choose(x), None, None)
        index_a, index_b, gate = routing[:3]
        A = self.lora_A[index_a].to(x.dtype)  # [B, r, d_in]
        B = self.lora_B[index_b].to(x.dtype)  # [B, r, d_out]
        u = F.dropout(x, self.p, self.training) @ A.mT  # [B, L, r]
        s = u * (self.scaling * gate).to(x.dtype).unsqueeze(1)
        y = self.base_layer(x) + s @ B
        return (y, routing) if return_routing else y


class Published(Gathering):
    """The released algorithm, from its description: it multiplies the chosen factors out to one dense update
    [d_in, d_out] for each instance, routes without gradient on every call, sums both sides of the conditional
    router separately, and keeps its parameters in the frozen layer's dtype."""

    def parameter(self, name: str, value: Tensor) -> nn.Parameter:
        dtype = next(self.base_layer.parameters()).dtype
        return nn.Parameter(value.to(dtype, copy=True), requires_grad=name.startswith("lora"))

    @torch.no_grad()
    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """In float32 at least: rounded to bfloat16, two probabilities that are nearly equal change places now and then,
        and what follows could not be compared with the reference."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        router_A, router_B, router_AB = (t.to(dtype) for t in (self.router_A, self.router_B, self.router_AB))
        pooled = x.mean(dim=1, dtype=dtype)
        index_a = torch.softmax(pooled @ router_A.T, -1).topk(self.r).indices
        chosen = self.lora_A[index_a].to(dtype)
        logits = torch.einsum("brd,rfe->bre", chosen, router_AB.mT)  # a product of sums
        p_cfs = torch.softmax(torch.softmax(logits, -1).sum(dim=1), -1)
        index_b = (torch.softmax(pooled @ router_B.T, -1) + p_cfs).topk(self.r).indices
        return index_a, index_b

    def forward(self, x: Tensor) -> Tensor:
        index_a, index_b = self.choose(x)
        update = torch.einsum("bri,bro->bio", self.lora_A[index_a], self.lora_B[index_b])  # [B, d_in, d_out]
        return self.base_layer(x) + F.dropout(x, self.p, self.training) @ update * self.scaling


def frozen(linear: nn.Linear, config: mk.MixLoRAConfig, factors: dict[str, Tensor]) -> nn.Module:
    return linear


def mixlora(linear: nn.Linear, config: mk.MixLoRAConfig, factors: dict[str, Tensor]) -> nn.Module:
    layer = mk.MixLoRALinear.from_linear(linear, config)
    layer.adapter.load_state_dict(factors)
    return layer


def peft_lora(linear: nn.Linear, config: mk.MixLoRAConfig, factors: dict[str, Tensor], exact: bool = True) -> nn.Module:
    """PEFT's layer, with the first r factors of each pool as its weights."""
    layer = with_lora(nn.Sequential(linear), config, exact, target_modules=["0"]).base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(factors["lora_A"][: config.r])
        layer.lora_B["default"].weight.copy_(factors["lora_B"][: config.r].T)
    return layer


def peft_lora_base_dtype(linear: nn.Linear, config: mk.MixLoRAConfig, factors: dict[str, Tensor]) -> nn.Module:
    return peft_lora(linear, config, factors, exact=False)


def with_lora(model: nn.Module, config: mk.MixLoRAConfig, exact: bool, **settings) -> nn.Module:
    lora = LoraConfig(r=config.r, lora_alpha=2 * config.r, lora_dropout=config.dropout, **settings)
    return get_peft_model(model, lora, autocast_adapter_dtype=exact)


def keep(config: mk.MixLoRAConfig) -> mk.MixLoRAConfig:
    return config


def preset(make: Callable[..., mk.MixLoRAConfig]) -> Callable[[mk.MixLoRAConfig], mk.MixLoRAConfig]:
    return lambda config: make(r=config.r, num_factors=config.num_factors, dropout=config.dropout)


@dataclass(frozen=True)
class Implementation:
    """One of those that are compared.

    Attributes:
        adapt: the frozen layer adapted, its parameters copies of the factors.
        configure: what it computes where a case says ``config``.
        kind: "frozen", "lora" or "mixlora": what it is to agree with, and how a whole model gets it.
        colour: in plots.
        layers: whether it is compared layer by layer as well; else in whole models alone.
        exact: whether its parameters are float32 whatever the frozen layer's dtype.
        keeps: whether it goes on with a routing that it is given.
        shares: whether siblings compute together.
        compiles: it is ``torch.compile`` of the module: where that fails, ``Unavailable``.
        every: it takes part in every so-manieth round, where it takes several times as long as others.
    """

    adapt: Callable[[nn.Linear, mk.MixLoRAConfig, dict[str, Tensor]], nn.Module]
    colour: str
    kind: str = "mixlora"
    configure: Callable[[mk.MixLoRAConfig], mk.MixLoRAConfig] = keep
    layers: bool = True
    exact: bool = True
    keeps: bool = True
    shares: bool = True
    compiles: bool = False
    every: int = 1


TIED = preset(mk.MixLoRAConfig.tied)

IMPLEMENTATIONS = {
    # the frozen layer alone
    "base": Implementation(frozen, "#8c8c8c", "frozen"),
    # PEFT's LoRA layer, alpha = 2 r, the adapter in float32 as PEFT makes it; and in the frozen layer's dtype
    "peft_lora": Implementation(peft_lora, "#e07b39", "lora"),
    "peft_lora_base_dtype": Implementation(peft_lora_base_dtype, "#f2b684", "lora", exact=False),
    # MixLoRA by gathering each instance's factors, two batched products, autograd; and compiled
    "eager": Implementation(Eager, "#5b8db8"),
    "compiled": Implementation(Eager, "#a7c4dc", compiles=True),
    # the released algorithm: a dense update for each instance, routers without gradient
    "published": Implementation(
        Published, "#b5446e", configure=preset(mk.MixLoRAConfig.published), exact=False, keeps=False, every=2
    ),
    # mixlora_kernels; in whole models also with every layer by itself, and with pairs of factors chosen as one
    "mixlora": Implementation(mixlora, "#2e8b57"),
    "mixlora_single": Implementation(mixlora, "#8fc9a6", layers=False, shares=False),
    "mixlora_tied": Implementation(mixlora, "#1b5e3a", configure=TIED, layers=False),
    "mixlora_tied_single": Implementation(mixlora, "#c4e3d1", configure=TIED, layers=False, shares=False),
}


class Built(NamedTuple):
    """An implementation on a problem's frozen layer."""

    module: nn.Module
    call: Callable[[Tensor], Tensor]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, under the names of ``Problem.factors``."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield name.removesuffix(".default.weight").rpartition(".")[2], parameter


def build(name: str, problem: Problem) -> Built:
    """The implementation of that name on the problem's frozen layer, with a copy of its factors.

    Raises:
        Unavailable: there is no compiler for one that is compiled.
    """
    chosen = IMPLEMENTATIONS[name]
    module = chosen.adapt(problem.linear, chosen.configure(problem.case.config), problem.factors)
    if chosen.compiles:
        module = compiled(module, problem)
    if problem.case.kept and chosen.kind == "mixlora" and chosen.keeps:
        context = mk.RoutingContext(routing=problem.routing)
        return Built(module, lambda x: module(x, context))
    return Built(module, module)


def compiled(module: nn.Module, problem: Problem) -> nn.Module:
    """``torch.compile`` of the module, compiled before it returns, so that no measurement contains it."""
    module = torch.compile(module)
    try:
        y = module(problem.x)
        if y.requires_grad:
            y.backward(problem.dy)
    except Exception as error:  # the compiler, the linker, a missing header: all end here, under many names
        reason = str(error).strip().splitlines()
        raise Unavailable(f"torch.compile failed: {reason[0] if reason else type(error).__name__}") from error
    return module
