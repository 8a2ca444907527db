"""Adapt the decoder of a LLaVA with MixLoRA, or with LoRA for comparison."""

import copy
import re

from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from mixlora_kernels.peft.targets import decoder_linears

from ..refusal import Refusal

# The projector's name in transformers' LLaVA and LLaVA-Next, and in the original LlavaLlamaForCausalLM.
PROJECTORS = ("model.multi_modal_projector", "model.mm_projector")


class Patched:
    """A patched LLaVA. The given model is changed in place.

    Attributes:
        model: a ``PeftModel`` around the given model, to train, save and generate with.
        modules: the names of the adapted layers.
    """

    def __init__(self, base: nn.Module, config: PeftConfig):
        self._trained_before = {name: p.requires_grad for name, p in base.named_parameters()}
        before = {name: module for name, module in base.named_modules()}
        self.model: PeftModel = get_peft_model(base, config)
        self.modules = [
            name
            for name, module in base.named_modules()
            if name in before and module is not before[name] and not isinstance(module, AuxiliaryTrainingWrapper)
            if hasattr(module, "base_layer")
        ]

    def report(self) -> dict:
        """A dictionary of ``modules``; the numbers of ``trainable`` and ``total`` parameters; and the numbers of
        trainable parameters of the ``adapter`` and of the ``projector``."""
        counts = {"adapter": 0, "projector": 0}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                counts["projector" if ".modules_to_save." in name else "adapter"] += _count(parameter)
        total = sum(_count(parameter) for parameter in self.model.parameters())
        return {"modules": self.modules, "trainable": sum(counts.values()), "total": total, **counts}

    def undo(self) -> nn.Module:
        """Remove the adapter, and restore the model: its layers, projector and trainable parameters. No hooks remain.

        Trained weights are lost unless they were saved before.
        """
        base = self.model.get_base_model()
        wrapped = {
            name: module.original_module
            for name, module in base.named_modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        }
        self.model.base_model.unload()
        for name, module in wrapped.items():  # unload() leaves the trained copies in the model
            base.set_submodule(name, module)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(self._trained_before[name])
        return base


def patch_llava(model: nn.Module, config: PeftConfig, *, train_projector: bool = False) -> Patched:
    """Adapt all linear layers of a LLaVA's decoder and freeze everything else.

    Args:
        model: transformers' LLaVA or LLaVA-Next, or the original ``LlavaLlamaForCausalLM``, recognised by the name of
            its projector. It is changed in place.
        config: a ``ConditionalMixLoRAConfig``, or another method's configuration, such as ``LoraConfig``. Its
            ``target_modules`` are used if they are not None.
        train_projector: whether to train the projector in full, as the released recipe does. Of a linear projector (see
            ``load.linear_projector``) only the first map is trained, because the second is the identity.

    Raises:
        ValueError: the model is not a LLaVA, is already adapted, or has no target modules. It is left unchanged.
    """
    projector = find_projector(model)
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise Refusal(f"{type(model).__name__} is adapted already: undo() that first")
    config = copy.deepcopy(config)
    if config.target_modules is None:
        config.target_modules = decoder_linears(model, config)
        config.layers_to_transform = config.layers_pattern = None  # the expression contains these settings
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        pattern = re.compile(config.target_modules)
        if not any(pattern.fullmatch(name) for name, _ in model.named_modules()):
            raise Refusal(f"nothing in {type(model).__name__} matches target_modules={config.target_modules!r}")
    if train_projector:
        config.modules_to_save = [*(config.modules_to_save or []), projector_to_train(model, projector)]
    return Patched(model, config)


def find_projector(model: nn.Module) -> str:
    """The name of a LLaVA's projector.

    Raises:
        ValueError: the model has no projector under a known name.
    """
    names = dict(model.named_modules())
    for projector in PROJECTORS:
        if projector in names:
            return projector
    raise Refusal(f"{type(model).__name__} is no LLaVA: it has no {' and no '.join(PROJECTORS)}")


def projector_to_train(model: nn.Module, projector: str) -> str:
    """The name of the module that is trained in full for a projector: its first map if the projector is linear."""
    linear = getattr(getattr(model, "config", None), "projector_hidden_act", None) == "linear"
    first = f"{projector}.linear_1"
    return first if linear and first in dict(model.named_modules()) else projector


def _count(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 numel() counts only the rank's part
