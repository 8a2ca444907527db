"""ConditionalMixLoRAConfig: MixLoRAConfig with the fields that peft needs of a method."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version
from peft import PeftConfig

from .. import __version__
from ..config import MixLoRAConfig, PooledTokens
from .card import write_card
from .registration import add_peft_type

# "MIXLORA" belongs to the other method of that name, a mixture of whole LoRA experts.
PEFT_TYPE = add_peft_type("CONDITIONAL_MIXLORA")


@dataclass
class ConditionalMixLoRAConfig(MixLoRAConfig, PeftConfig):
    """What one adapter computes (see ``MixLoRAConfig``), and which layers of a model it adapts.

    Args:
        pool: as in ``MixLoRAConfig``, but the default is ``"prompt"``: training then routes as generation does, which
            has no answer to read. The labels tell which tokens are the prompt; without labels, ``logits_to_keep`` of a
            forward that scores an answer does. An instance is routed by its whole sequence if its labels leave no
            prompt (all tokens from the second on are labelled), and also if there are neither labels nor
            ``logits_to_keep``. In training, the latter causes a warning. With ``"text"``, the tokens of ``input_ids``
            that stand for images or other media are left out of the prompt's mean; a prompt without text keeps them.
        balance: as in ``MixLoRAConfig``. In training, a forward with labels adds the load-balancing loss to the loss
            that the model returns: this weight, times the mean over the layers. A trainer that computes its loss from
            the logits (DPO, GRPO) does not see it. A forward that returns no loss, or whose routings have no gradient,
            causes a warning.
        target_modules: names, or endings of names, of the linear layers to adapt; a regular expression for the whole
            name; or ``"all-linear"``. None: every linear layer inside the text decoder's layers. A vision tower, a
            projector and the head are then not adapted.
        exclude_modules: names, endings of names, or a regular expression, of layers that are not adapted even if they
            match.
        layers_to_transform: indices of the decoder's layers to adapt; None: all.
        layers_pattern: name of the list of layers that the indices refer to, if the decoder has several lists.
        modules_to_save: modules to train in full and to save with the adapter, such as LLaVA's
            ``["multi_modal_projector"]``.
        init_weights: False initialises ``lora_B`` at random instead of zero (for tests).
        mixlora_kernels_version: the version of this package that wrote the adapter; it is set automatically. A version
            newer than the installed one causes a warning, because it may have settings that the installed one lacks.

    Raises:
        ValueError: as ``MixLoRAConfig``, also for peft's fields; a regular expression is invalid, or comes together
            with ``layers_to_transform``.
    """

    pool: PooledTokens = "prompt"
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    mixlora_kernels_version: str | None = None

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        MixLoRAConfig.__post_init__(self)
        self.peft_type = PEFT_TYPE
        self.mixlora_kernels_version = self.mixlora_kernels_version or __version__
        _warn_of_newer(self.mixlora_kernels_version)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
            elif isinstance(value, str):
                _check_expression(name, value)
        if isinstance(self.target_modules, str) and (
            self.layers_to_transform is not None or self.layers_pattern is not None
        ):
            raise ValueError(
                "layers_to_transform and layers_pattern need target_modules as a list of names (or None), not as the "
                f"expression {self.target_modules!r}; put the layers' indices into the expression"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern has an effect only with layers_to_transform, which is not given")

    @classmethod
    def tied(cls, **settings: Any) -> "ConditionalMixLoRAConfig":
        """The recommended settings: tied pairs with the normalized gate as in ``MixLoRAConfig.tied``, routed by the
        prompt's text, with the load-balancing loss. ``settings`` override these settings or add to them."""
        return super().tied(**{"pool": "text", "balance": 0.3, **settings})

    def to_dict(self) -> dict[str, Any]:
        """As in peft. The result records the installed version of this package."""
        return {**super().to_dict(), "mixlora_kernels_version": __version__}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in peft. It also writes a model card, ``README.md``, beside the configuration."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(Path(save_directory), self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "ConditionalMixLoRAConfig":
        """As in peft. The configuration remembers its source, so that the weights there can be checked before a model
        is changed (see ``loading``)."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config._read_from = str(pretrained_model_name_or_path), {**kwargs, "subfolder": subfolder}
        return config


def _check_expression(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{name} is not a valid regular expression ({error}), got {expression!r}") from error


def _warn_of_newer(version: str) -> None:
    try:
        newer = Version(version) > Version(__version__)
    except InvalidVersion as error:
        raise ValueError(
            f"mixlora_kernels_version must be a version such as {__version__!r}, got {version!r}"
        ) from error
    if newer:
        warnings.warn(
            f"this adapter was made by mixlora_kernels {version}, and {__version__} is installed: settings that only "
            "the newer version has are ignored, so that the adapter may compute something else than in its training. "
            "Install the newer version",
            stacklevel=2,
        )
