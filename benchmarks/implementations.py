"""The implementations that are compared, each of one layer, under the names they have in the results.

base                  the frozen layer alone
peft_lora             PEFT's LoRA layer, alpha = 2 r, the adapter in float32 as PEFT makes it
peft_lora_base_dtype  the same with the adapter in the frozen layer's dtype
eager                 MixLoRA by gathering each instance's factors, two batched products, autograd
compiled              torch.compile of ``eager``
published             the released algorithm: a dense update for each instance, routers without gradient
mixlora               mixlora_kernels.MixLoRALinear

And of whole models alone, through PEFT:

mixlora_single        ``mixlora`` with every layer computed by itself, whoever else reads its x
mixlora_tied          the preset ``MixLoRAConfig.tied()``: pairs of factors chosen as one
mixlora_tied_single   both
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from problem import Problem
from torch import Tensor, nn

import mixlora_kernels as mk

NAMES = ("base", "peft_lora", "peft_lora_base_dtype", "eager", "compiled", "published", "mixlora")
OF_MODELS = ("mixlora_single", "mixlora_tied", "mixlora_tied_single")


class Implementation(NamedTuple):
    module: nn.Module
    call: Callable[[Tensor], Tensor]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, under the names of ``Problem.factors``."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield name.removesuffix(".default.weight").rpartition(".")[2], parameter


class Unavailable(RuntimeError):
    """This implementation cannot run here; the message says why."""


class Eager(nn.Module):
    """MixLoRA as one writes it first: the chosen factors gathered to [B, r, d], then two batched products."""

    def __init__(self, base: nn.Module, config: mk.MixLoRAConfig, factors: dict[str, Tensor]):
        super().__init__()
        self.base_layer, self.r, self.scaling, self.p = base, config.r, config.scaling, config.dropout
        for name, value in factors.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

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


class Published(nn.Module):
    """The released algorithm, from its description: it multiplies the chosen factors out to one dense update
    [d_in, d_out] for each instance, routes without gradient on every call, sums both sides of the conditional
    router separately, and keeps its parameters in the frozen layer's dtype."""

    def __init__(self, base: nn.Module, config: mk.MixLoRAConfig, factors: dict[str, Tensor]):
        super().__init__()
        self.base_layer, self.r, self.scaling, self.p = base, config.r, config.scaling, config.dropout
        dtype = next(base.parameters()).dtype
        for name, value in factors.items():
            trained = name.startswith("lora")
            self.register_parameter(name, nn.Parameter(value.to(dtype, copy=True), requires_grad=trained))

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


def configure(name: str, config: mk.MixLoRAConfig) -> mk.MixLoRAConfig:
    """What the implementation of that name computes where a case says ``config``."""
    settings = {"r": config.r, "num_factors": config.num_factors, "dropout": config.dropout}
    if name == "published":
        return mk.MixLoRAConfig.published(**settings)
    return mk.MixLoRAConfig.tied(**settings) if name.startswith("mixlora_tied") else config


def adapt(name: str, base: nn.Module, config: mk.MixLoRAConfig, factors: dict[str, Tensor]) -> nn.Module:
    """The frozen layer with a MixLoRA adapter, its parameters copies of the factors."""
    if name.startswith("mixlora"):
        layer = mk.MixLoRALinear.from_linear(base, config)
        layer.adapter.load_state_dict(factors)
        return layer
    return {"eager": Eager, "compiled": Eager, "published": Published}[name](base, config, factors)


def build(name: str, problem: Problem) -> Implementation:
    """The implementation of that name on the problem's frozen layer, with a copy of its factors.

    Raises:
        Unavailable: there is no compiler for ``compiled``.
    """
    if name == "base":
        return Implementation(problem.linear, problem.linear)
    if name.startswith("peft_lora"):
        layer = peft_lora(problem, autocast_adapter_dtype=name == "peft_lora")
        return Implementation(layer, layer)
    module = adapt(name, problem.linear, problem.case.config, problem.factors)
    if name == "compiled":
        module = compiled(module, problem)
    if problem.case.kept and name != "published":  # the released code routes every step anew
        context = mk.RoutingContext(routing=problem.routing)
        return Implementation(module, lambda x: module(x, context))
    return Implementation(module, module)


def peft_lora(problem: Problem, autocast_adapter_dtype: bool) -> nn.Module:
    """PEFT's layer, with the first r factors of each pool as its weights."""
    r = problem.case.r
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=problem.case.dropout, target_modules=["0"])
    model = get_peft_model(nn.Sequential(problem.linear), config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(problem.factors["lora_A"][:r])
        layer.lora_B["default"].weight.copy_(problem.factors["lora_B"][:r].T)
    return layer


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
