"""ConditionalMixLoRAModel: peft's tuner; it finds the layers, replaces them and keeps their batch in view."""

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

    Merging is refused: the update depends on the input.
    """

    prefix = "mixlora_"
    tuner_layer_cls = MixLoRALayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # see choose_targets
    _before: Before | None = None  # the model before the adapter that is being injected or loaded
    _loading: str | None = None  # that adapter's name

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in peft, after a check of all that is known: the targets, and the weights where an adapter is loaded.

        Raises:
            ValueError: a target that the model does not have, or that is no linear layer; or weights that are not
                what the configuration makes of this model. The model is as it was.
        """
        config = self.peft_config[adapter_name]
        load = running_load(getattr(config, "_read_from", None))
        self._before = Before(model)
        self.side = side_information(model)
        try:
            choose_targets(model, config)
            expected = {}
            if kwargs.get("state_dict") is None:  # else peft reads the targets from its keys
                check_targets(model, config, self._check_target_module_exists)
                expected = tensors_to_come(model, config, self._check_target_module_exists)
            if load is not None:
                check_load(load, expected, adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self.side.install(model)
        except Exception:  # whatever it was, the model is put back as it was, and the error goes on
            self.withdraw(adapter_name)
            raise
        if load is None:
            self.forget()
            return
        self._loading = adapter_name
        if load.loader.owner is not PeftModel:
            setattr(model, LOADING, partial(load_strictly, getattr(type(model), LOADING), self, adapter_name, expected))

    def withdraw(self, adapter_name: str) -> None:
        """Take out an adapter that was injected, perhaps in part, and put the model back as it was before."""
        before = self._before
        if before is None:
            raise RuntimeError(f"adapter {adapter_name!r} is not being injected or loaded, so it cannot be withdrawn")
        self.peft_config.pop(adapter_name, None)
        before.restore()
        if before.first:
            self.side.remove()
        self.forget()

    def forget(self) -> None:
        """Nothing is being loaded (any more): what the model was before is of no use now."""
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
            layer.requires_grad_(False)  # a further adapter is not trained unless it is made active
        self._replace_module(parent, target_name, layer, target)

    def routing_report(self, **options: Any) -> RoutingReport:
        """See ``mixlora_kernels.peft.routing_report``."""
        return routing_report(self.model, **options)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Within a forward or generate(**kwargs): hand each layer the adapter of each row."""
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
        # peft's own also hands on the child's weight, which a projector among modules_to_save does not have. Ours is in
        # the frozen layer, which is kept, and the adapter is on its device already (MixLoRALayer.update_layer).
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
        """As in peft, and refuse weights that do not fit the adapter, which peft loads as far as they go.

        Raises:
            ValueError: names, shapes or dtypes differ, or values are not finite. An adapter that was injected for
                these weights alone is taken out.
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
    """Look at the weights that are going to be loaded.

    Raises:
        ValueError: there are none, or they do not fit.
    """
    if load.tensors is not None:
        given = without_prefix(describe(load.tensors), load.loader.prefix)
        check_fits(expected, given, adapter_name, names_may_change=True)
    elif load.folder is not None:
        check_weights(load.find_weights(), expected, adapter_name, load.loader.prefix)


def side_information(model: nn.Module) -> SideInformation:
    """What the layers of the model share, or a new one for a model without any."""
    try:
        return find_side_information(model)
    except ValueError:
        return SideInformation()


def _pass_adapter_names(
    _module: nn.Module, args: tuple, kwargs: dict | None = None, *, adapter_names: list[str], thread: int
) -> tuple[tuple, dict] | None:
    # Another thread's forward has other rows. It may meet the hook half registered, and then calls it without kwargs.
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
