"""MixLoRALayer: a frozen linear layer and its adapters, as a layer of peft."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapter import MixLoRAAdapter, frozen_map
from ..op import mixlora_siblings
from ..routing import Routing, RoutingContext
from .config import ConditionalMixLoRAConfig
from .rows import rows_as_instances
from .siblings import Family
from .side_information import SideInformation


class MergingError(NotImplementedError, ValueError):
    """The refusal to merge. peft documents a ValueError, and its methods that cannot merge raise a
    NotImplementedError."""

    def __init__(self) -> None:
        super().__init__(
            "a MixLoRA adapter cannot be merged into the weights: which factors it adds depends on the input, so that "
            "there is no one weight to add them to"
        )


class LayerAdapter(MixLoRAAdapter):
    """A ``MixLoRAAdapter`` that peft's wrapping policy for FSDP recognises.

    The policy makes an FSDP unit of each module without children whose ``weight`` is trained. The adapter's parameters
    need their own unit, because all parameters of a unit must have one dtype, and all or none of them must be trained.
    """

    @property
    def weight(self) -> Tensor:
        return self.lora_A

    def forward(
        self, x: Tensor, base: nn.Module | Tensor, context: RoutingContext | None = None
    ) -> tuple[Tensor, Routing]:
        """As ``MixLoRAAdapter``, but the returned routing and ``context.routing`` are those of a group of one, [1, B,
        ...]: a decoder's forward keeps routings in this form."""
        frozen = frozen_map(base, x) if isinstance(base, nn.Module) else base
        (y,), routing = mixlora_siblings(
            x, (frozen,), (self.factors,), self.config, context, training=self.training, backend=self.backend
        )
        return y, routing


if TYPE_CHECKING:

    class Adapters(nn.ModuleDict):
        """The adapters of a layer, by name."""

        _modules: dict[str, LayerAdapter]  # type: ignore[assignment]  # nn.Module says: Module | None

        def __getitem__(self, name: str) -> LayerAdapter: ...
else:
    Adapters = nn.ModuleDict


class MixLoRALayer(nn.Module, BaseTunerLayer):
    """The replacement of a linear layer: ``base_layer`` is that layer, ``mixlora_adapter`` holds a ``LayerAdapter`` for
    each adapter.

    Args:
        base_layer: any module that maps [..., in_features] to [..., out_features].
        key: the layer's name in the model. Its routing is kept and reported under this name.
        side: the batch's side information, which all layers of a model share.
    """

    adapter_cls = LayerAdapter
    adapter_layer_names = ("mixlora_adapter",)
    other_param_names = ("configs",)

    # Attributes of peft's class.
    active_adapters: list[str]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int, key: str, side: SideInformation):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.key, self.side = key, side
        self.parent, self.family = key.rpartition(".")[0], Family()
        self.mixlora_adapter = Adapters()
        self.configs: dict[str, ConditionalMixLoRAConfig] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: ConditionalMixLoRAConfig, inference_mode: bool = False) -> None:
        """Add an adapter."""
        adapter = LayerAdapter(self.in_features, self.out_features, config)
        if not config.init_weights:
            bound = self.in_features**-0.5
            nn.init.uniform_(adapter.lora_B, -bound, bound)
        self.mixlora_adapter[adapter_name] = adapter
        self.configs[adapter_name] = config
        adapter.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """Return the frozen layer's output with the updates of the active adapters.

        Args:
            x: [B, L, in_features], or another shape that the frozen layer takes. Other arguments are passed to it.
            adapter_names: the adapter of each row of x, or ``"__base__"`` for none. For inference only.
        """
        if self._disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        names = [name for name in self._active_adapter if name in self.mixlora_adapter._modules]
        forward_pass = self.side.forward_pass
        y: nn.Module | Tensor = self.base_layer
        if args or kwargs:
            y = self.base_layer(x, *args, **kwargs)
        elif len(names) == 1 and forward_pass is not None and self.side.groups_siblings:
            shared = forward_pass.siblings.compute(self, names[0], x, forward_pass)
            if shared is not None:
                return shared
        for name in names:
            y = self._adapt(name, x, y)
        return y if isinstance(y, Tensor) else y(x)

    def _adapt(self, name: str, x: Tensor, base: nn.Module | Tensor, rows: list[int] | None = None) -> Tensor:
        config, forward_pass = self.configs[name], self.side.forward_pass
        if forward_pass is None:
            self.side.check_outside(self)
            prepared, context = rows_as_instances(x if rows is None else x[rows]), None
        else:
            prepared, context = forward_pass.prepare([self.key], name, config, x, rows)
        if prepared is x:
            y, routing = self.mixlora_adapter[name](x, base, context)
        else:
            if isinstance(base, Tensor):
                base = base.reshape(*prepared.shape[:-1], base.shape[-1])
            y, routing = self.mixlora_adapter[name](prepared, base, context)
            tokens = x.shape[:-1] if rows is None else (len(rows), *x.shape[1:-1])
            y = y.view(*tokens, y.shape[-1])
        if forward_pass is not None:
            forward_pass.record(self.key, name, routing, 0)
        return y

    def _forward_mixed(self, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        y = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name in self.mixlora_adapter:
                rows = [row for row, row_name in enumerate(adapter_names) if row_name == name]
                y[rows] = self._adapt(name, x, y[rows], rows)
        return y

    # peft makes all parameters of an adapter trainable. The routers of gate="binary" must stay fixed.

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze_routers()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad=requires_grad)
        self._freeze_routers()

    def _freeze_routers(self) -> None:
        for name, config in self.configs.items():
            if config.gate == "binary" and name in self.mixlora_adapter:
                for parameter_name, parameter in self.mixlora_adapter[name].named_parameters():
                    if "router" in parameter_name and parameter.is_leaf:
                        parameter.requires_grad_(False)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise MergingError

    def unmerge(self) -> None:
        raise MergingError
