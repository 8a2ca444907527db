"""ConditionalMixLoRAModel: peft's tuner. It finds the layers to adapt, replaces them, and hooks the model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import Any, ClassVar

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .before import Before
from .config import ConditionalMixLoRAConfig
from .expected import tensors_in_place, tensors_to_come
from .files import check_fits, check_weights, describe, without_prefix
from .layer import MergingError, MixLoRALayer
from .linears import linear_sizes
from .loading import Load, running_load
from .registration import LOADING
from .report import RoutingReport, routing_report
from .side_information import SideInformation, find_side_information
from .strict import load_strictly
from .targets import check_targets, choose_targets


class ConditionalMixLoRAModel(BaseTuner):
    """Conditional Mixture-of-LoRA in the linear layers of a model.

    Merging is refused, because the update depends on the input.
    """

    prefix = "mixlora_"
    tuner_layer_cls = MixLoRALayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # see choose_targets
    _before: Before | None = None  # the model before the running injection or loading
    _loading: str | None = None  # the name of the adapter that is being loaded

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in peft, but first check the targets, and the weights if an adapter is being loaded.

        Raises:
            ValueError: the model lacks a target, or a target is not a linear layer; or the weights do not fit the
                configuration and this model. The model is left unchanged.
        """
        config = self.peft_config[adapter_name]
        load = running_load(getattr(config, "_read_from", None))
        self._before = Before(model)
        self.side = side_information(model)
        try:
            choose_targets(model, config)
            expected = {}
            if kwargs.get("state_dict") is None:  # with one, peft reads the targets from its keys
                check_targets(model, config, self._check_target_module_exists)
                expected = tensors_to_come(model, config, self._check_target_module_exists)
            if load is not None:
                check_load(load, expected, adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self.side.install(model)
        except Exception:  # after any error the model is restored
            self.withdraw(adapter_name)
            raise
        if load is None:
            self.forget()
            return
        self._loading = adapter_name
        if load.loader.owner is not PeftModel:
            setattr(model, LOADING, partial(load_strictly, getattr(type(model), LOADING), self, adapter_name, expected))

    def withdraw(self, adapter_name: str) -> None:
        """Remove an adapter that was injected, perhaps in part, and restore the model."""
        before = self._before
        if before is None:
            raise RuntimeError(f"adapter {adapter_name!r} is not being injected or loaded, so it cannot be withdrawn")
        self.peft_config.pop(adapter_name, None)
        before.restore()
        if before.first:
            self.side.remove()
        self.forget()

    def forget(self) -> None:
        """Forget the model's earlier state, because no adapter is being loaded any more."""
        self._loading = self._before = None

    def _create_and_replace(
        self, peft_config: ConditionalMixLoRAConfig, adapter_name: str, target: nn.Module, target_name: str,
        parent: nn.Module, current_key: str, **_: Any,
    ) -> None:  # fmt: skip
        if isinstance(target, MixLoRALayer):
            target.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
            return
        layer = MixLoRALayer(target, *linear_sizes(target), current_key, self.side)
        layer.train(target.training)
        layer._active_adapter = [adapter_name]
        layer.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is trained only if it is made active
        self._replace_module(parent, target_name, layer, target)

    def routing_report(self, **options: Any) -> RoutingReport:
        """See ``mixlora_kernels.peft.routing_report``."""
        return routing_report(self.model, **options)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Within a forward or generate(**kwargs), pass the adapter of each row to each layer."""
        _check_generation(self.model, kwargs)
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if unknown := set(names) - set(self.peft_config) - {"__base__"}:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        options = kwargs.get("generation_config")
        copies = max(
            kwargs.get(name) or getattr(options, name, None) or 1 for name in ("num_beams", "num_return_sequences")
        )
        names = [name for name in names for _ in range(copies)]
        hook = partial(_pass_adapter_names, adapter_names=names, thread=get_ident())
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, (MixLoRALayer, AuxiliaryTrainingWrapper)):
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # peft's own method also copies a reference to the child's weight, which a projector among modules_to_save
        # lacks. A MixLoRALayer keeps the child as its frozen layer, and update_layer puts the adapter on the child's
        # device.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise MergingError

    def _unload_and_optionally_merge(self, merge: bool = True, **options: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        model = super()._unload_and_optionally_merge(merge=merge, **options)
        self.side.remove()
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ConditionalMixLoRAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As in peft, but refuse weights that do not fit the adapter. peft would load those that fit.

        Raises:
            ValueError: names, shapes or dtypes differ, or values are not finite. If the adapter was injected to load
                these weights, it is removed.
        """
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = model.base_model if isinstance(model, PeftModel) else None
        try:
            check_fits(tensors_in_place(model, adapter_name), describe(state_dict), adapter_name)
        except ValueError:
            if tuner is not None and tuner._loading == adapter_name:
                tuner.withdraw(adapter_name)
            raise
        if tuner is not None:
            tuner.forget()
        return state_dict


def check_load(load: Load, expected: dict, adapter_name: str) -> None:
    """Check the weights that are about to be loaded.

    Raises:
        ValueError: there are no weights, or they do not fit.
    """
    if load.tensors is not None:
        given = without_prefix(describe(load.tensors), load.loader.prefix)
        check_fits(expected, given, adapter_name, names_may_change=True)
    elif load.folder is not None:
        check_weights(load.find_weights(), expected, adapter_name, load.loader.prefix)


def side_information(model: nn.Module) -> SideInformation:
    """The side information that the model's layers share, or a new one if the model has no adapted layers."""
    try:
        return find_side_information(model)
    except ValueError:
        return SideInformation()


def _pass_adapter_names(
    _module: nn.Module, args: tuple, kwargs: dict | None = None, *, adapter_names: list[str], thread: int
) -> tuple[tuple, dict] | None:
    # Another thread's forward has other rows. If it runs while this hook is being registered, it passes no kwargs.
    if get_ident() != thread:
        return None
    return args, {**(kwargs or {}), "adapter_names": adapter_names}


def _check_generation(model: nn.Module, kwargs: dict) -> None:
    configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
    chunk = kwargs.get("prefill_chunk_size") or next(
        (size for config in configs if (size := getattr(config, "prefill_chunk_size", None))), None
    )
    if chunk:
        raise ValueError(
            f"prefill_chunk_size={chunk}: a prompt prefilled in chunks cannot be routed as one instance. Prefill it "
            "at once (prefill_chunk_size=None)"
        )
