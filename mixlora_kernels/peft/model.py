"""ConditionalMixLoRAModel: peft's tuner; it finds the layers, replaces them and keeps their batch in view."""

from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident
from typing import ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .config import ConditionalMixLoRAConfig
from .files import LOADING, check_fits, load_strictly
from .layer import MergingError, MixLoRALayer
from .report import routing_report
from .side_information import SideInformation, find_side_information
from .targets import check_targets, decoder_linears


class ConditionalMixLoRAModel(BaseTuner):
    """Conditional Mixture-of-LoRA in the linear layers of a model.

    Merging is refused: the update depends on the input.
    """

    prefix = "mixlora_"
    tuner_layer_cls = MixLoRALayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # see decoder_linears

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """As in peft, after a check of all targets: what cannot be adapted is refused before anything is replaced.

        Raises:
            ValueError: a target that the model does not have, or that is no linear layer.
        """
        config = self.peft_config[adapter_name]
        if config.target_modules is None:
            config.target_modules = decoder_linears(model, config)
            config.layers_to_transform = config.layers_pattern = None  # the expression holds their choice
        state_dict = kwargs.get("state_dict")
        if state_dict is None:
            check_targets(model, config, self._check_target_module_exists)
        self.side = side_information(model)
        layer = next((module for module in model.modules() if isinstance(module, MixLoRALayer)), None)
        self._active_before = None if layer is None else layer.active_adapters
        self._trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.side.install(model)
        if hasattr(model, LOADING):
            setattr(model, LOADING, partial(load_strictly, getattr(type(model), LOADING), self, adapter_name))

    def withdraw(self, adapter_name: str) -> None:
        """Take out an adapter that was injected for weights which turned out not to fit: the model is as before."""
        if self._active_before is None:
            modules = dict(self.model.named_modules())
            self.unload()
            for name, module in modules.items():  # unload() leaves the copy that was to be trained
                if isinstance(module, AuxiliaryTrainingWrapper):
                    self.model.set_submodule(name, module.original_module)
            if hasattr(self.model, LOADING):
                self.model._hf_peft_config_loaded = False
        else:
            self.delete_adapter(adapter_name)
            self.set_adapter(self._active_before)
        trained = {id(parameter) for parameter in self._trained_before}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def _create_and_replace(
        self, peft_config: ConditionalMixLoRAConfig, adapter_name, target, target_name, parent, current_key, **_
    ) -> None:
        if isinstance(target, MixLoRALayer):
            target.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer = MixLoRALayer(target, *_get_in_out_features(base), current_key, self.side)
        layer.train(target.training)
        layer._active_adapter = [adapter_name]
        layer.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained unless it is made active
        self._replace_module(parent, target_name, layer, target)

    def routing_report(self, **options) -> dict:
        """See ``mixlora_kernels.peft.routing_report``."""
        return routing_report(self.model, **options)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_, **kwargs):
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

    def _unload_and_optionally_merge(self, merge: bool = True, **options) -> nn.Module:
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
            ValueError: keys or shapes differ. An adapter that was injected for these weights alone is taken out.
        """
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        marker = f".{cls.prefix}adapter."
        expected = {key: value for key, value in model.state_dict().items() if f"{marker}{adapter_name}." in key}
        try:
            check_fits(expected, {key: value for key, value in state_dict.items() if marker in key}, adapter_name)
        except ValueError:
            if getattr(config, "_awaits_weights", False):
                model.base_model.withdraw(adapter_name)
            raise
        config._awaits_weights = False
        return state_dict


def side_information(model: nn.Module) -> SideInformation:
    """What the layers of the model share, or a new one for a model without any."""
    try:
        return find_side_information(model)
    except ValueError:
        return SideInformation()


def _pass_adapter_names(_module, args, kwargs=None, *, adapter_names, thread):
    # Another thread's forward has other rows. It may meet the hook half registered, and then calls it without kwargs.
    if get_ident() != thread:
        return None
    return args, {**kwargs, "adapter_names": adapter_names}


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
