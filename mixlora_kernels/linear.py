"""MixLoRALinear: a frozen layer and an adapter."""

import torch
from torch import Tensor, nn

from .adapter import MixLoRAAdapter
from .config import MixLoRAConfig
from .routing import Routing, RoutingContext


class MixLoRALinear(nn.Module):
    """A linear layer that Conditional Mixture-of-LoRA adapts. It takes the place of the layer.

    ``base_layer`` is the frozen layer, and ``adapter`` is a ``MixLoRAAdapter`` with the trained parameters.

    Args:
        in_features, out_features: d_in and d_out of a new ``nn.Linear``. ``from_linear`` adapts an existing layer.
        config: what to compute; ``MixLoRAConfig()`` by default.
        bias: whether the new layer has a bias.
        device, dtype: of the new layer. The adapter's parameters are float32, or float64 for a float64 layer.
        backend: ``"reference"`` (the paper's equations one by one), ``"torch"``, ``"triton"``, or None, which means
            triton on a GPU and torch elsewhere. Assignment to ``layer.backend`` changes it at any time.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: MixLoRAConfig | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        self._adapt(
            nn.Linear(in_features, out_features, bias, device, dtype), config, in_features, out_features, backend
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        config: MixLoRAConfig | None = None,
        *,
        in_features: int | None = None,
        out_features: int | None = None,
        backend: str | None = None,
    ) -> "MixLoRALinear":
        """Adapt a given layer. The new layer keeps and freezes the given one, and makes no copy of it.

        Args:
            linear: any module that maps [..., d_in] to [..., d_out].
            in_features, out_features: d_in and d_out, if the module has no attributes of these names.

        Raises:
            TypeError: ``linear`` is not a module.
            ValueError: neither the module nor the arguments tell d_in and d_out.
        """
        if not isinstance(linear, nn.Module):
            raise TypeError(f"linear must be a torch.nn.Module, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        d_in, d_out = _size(linear, "in_features", in_features), _size(linear, "out_features", out_features)
        layer._adapt(linear, config, d_in, d_out, backend)
        return layer

    def _adapt(
        self, linear: nn.Module, config: MixLoRAConfig | None, in_features: int, out_features: int, backend: str | None
    ) -> None:
        self.base_layer = linear.requires_grad_(False)
        like = next((p for p in linear.parameters()), torch.empty(0))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.adapter = MixLoRAAdapter(
            in_features, out_features, config or MixLoRAConfig(), device=like.device, dtype=dtype, backend=backend
        )
        self.adapter.train(linear.training)
        self.train(linear.training)

    @property
    def config(self) -> MixLoRAConfig:
        return self.adapter.config

    @property
    def in_features(self) -> int:
        return self.adapter.in_features

    @property
    def out_features(self) -> int:
        return self.adapter.out_features

    @property
    def backend(self) -> str | None:
        return self.adapter.backend

    @backend.setter
    def backend(self, name: str | None) -> None:
        self.adapter.backend = name

    def forward(
        self, x: Tensor, context: RoutingContext | None = None, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """Equations 1 and 5 to 9.

        Args:
            x: hidden states [B, L, d_in], or [L, d_in] for one instance. With ``context.cu_seqlens``: several
                instances end to end, [N, d_in] or [1, N, d_in].
            context: see ``RoutingContext``; None: the mean runs over all tokens.
            return_routing: whether to return the ``Routing`` as well.

        Returns:
            y [..., d_out], with x's other dimensions; and the routing if ``return_routing``.

        Raises:
            TypeError, ValueError: the input does not fit. Nothing was computed.
        """
        y, routing = self.adapter(x, self.base_layer, context)
        return (y, routing) if return_routing else y


def _size(linear: nn.Module, name: str, given: int | None) -> int:
    size = getattr(linear, name, None) if given is None else given
    if not isinstance(size, int):
        raise ValueError(f"{type(linear).__name__} has no attribute {name}: pass {name} to from_linear")
    return size
