"""MixLoRAAdapter: the parameters of one adapter, and the computation that adds it to a frozen layer."""

import math
from typing import TypeGuard

import torch
from torch import Tensor, nn

from .backends.base import Factors, FrozenLinear
from .backends.select import check_name
from .checks import factor_shapes
from .config import MixLoRAConfig
from .op import mixlora
from .routing import Routing, RoutingContext


class MixLoRAAdapter(nn.Module):
    """The pools and routers that adapt one linear layer.

    Parameters: ``lora_A`` [E, d_in], ``lora_B`` [E, d_out], ``router_A`` and ``router_B`` [E, d_route],
    ``router_AB`` [r, E, d_in]. A router that the configuration does not use is None. Under ``gate="binary"`` the
    routers are not trained and do not require a gradient.

    Args:
        in_features, out_features: d_in and d_out.
        config: what to compute.
        device, dtype: of the parameters. The default dtype is float32, whatever the frozen layer's dtype is.
        backend: see ``MixLoRALinear``.

    Raises:
        TypeError: ``config`` is not a ``MixLoRAConfig``.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    router_A: nn.Parameter | None
    router_B: nn.Parameter | None
    router_AB: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: MixLoRAConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        if not isinstance(config, MixLoRAConfig):
            raise TypeError(f"config must be a MixLoRAConfig, got {type(config).__name__}")
        self.in_features, self.out_features, self.config = in_features, out_features, config
        self.backend = backend
        dtype = dtype or torch.float32
        for name, shape in self.shapes(in_features, out_features, config).items():
            parameter = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            if name.startswith("router") and parameter is not None:
                parameter.requires_grad_(config.gate != "binary")
            self.register_parameter(name, parameter)
        self.reset_parameters()

    @staticmethod
    def shapes(in_features: int, out_features: int, config: MixLoRAConfig) -> dict[str, tuple[int, ...] | None]:
        """The shape of each parameter by name, or None for a parameter that the configuration does not use."""
        return factor_shapes(config, in_features, out_features)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters. ``lora_B`` is zero, so that the adapted layer starts as the frozen one. The others
        are uniform within 1 / sqrt(fan-in), as in ``nn.Linear``. ``router_AB`` multiplies all r factors at once, so
        that its fan-in is r * d_in."""
        nn.init.zeros_(self.lora_B)
        for name in ("lora_A", "router_A", "router_B", "router_AB"):
            parameter = getattr(self, name)
            if parameter is not None:
                fan_in = parameter.shape[-1] * (self.config.r if name == "router_AB" else 1)
                nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    @property
    def backend(self) -> str | None:
        return self._backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        self._backend = check_name(name)

    @property
    def factors(self) -> Factors:
        return Factors(self.lora_A, self.lora_B, self.router_A, self.router_B, self.router_AB)

    def forward(
        self, x: Tensor, base: nn.Module | Tensor, context: RoutingContext | None = None
    ) -> tuple[Tensor, Routing]:
        """Return the adapted output and the routing; see ``mixlora_kernels.mixlora``.

        ``base`` is the frozen layer, or its output for x if that has been computed, as with several adapters.
        """
        frozen = frozen_map(base, x) if isinstance(base, nn.Module) else base
        return mixlora(x, frozen, self.factors, self.config, context, training=self.training, backend=self.backend)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.config}"


def frozen_map(base: nn.Module, x: Tensor) -> FrozenLinear | Tensor:
    """What the operation needs of a frozen layer: its parameters if ``can_fuse``, else its output for x."""
    return FrozenLinear(base.weight, base.bias) if can_fuse(base) else base(x)


def can_fuse(base: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the operation may compute the frozen product itself, without calling the layer.

    It may for a plain nn.Linear with its own forward, without hooks (some hooks fetch the weight), whose parameters are
    plain tensors and frozen.
    """
    if type(base) is not nn.Linear or "forward" in base.__dict__ or has_hooks(base):
        return False
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    return weight is not None and _is_frozen(weight) and (bias is None or _is_frozen(bias))


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_frozen(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.requires_grad
