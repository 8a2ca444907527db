"""ConditionalMixLoRAConfig: MixLoRAConfig with the fields that peft asks of a method."""

from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..config import MixLoRAConfig, Pool
from .files import check_weights_file
from .registration import add_peft_type

# "MIXLORA" belongs to the other method of that name, a mixture of whole LoRA experts.
PEFT_TYPE = add_peft_type("CONDITIONAL_MIXLORA")


@dataclass
class ConditionalMixLoRAConfig(MixLoRAConfig, PeftConfig):
    """What one adapter computes (see ``MixLoRAConfig``) and where it sits in a model.

    Args:
        pool: as in ``MixLoRAConfig``, but ``"prompt"`` unless told otherwise: training then routes as generation does,
            which has no answer to pool. The labels tell the prompt; without labels, a scoring forward's
            ``logits_to_keep`` does. An instance whose labels leave no prompt (an answer from its second token on) is
            routed by its whole sequence, and so is one without either, with a warning where that is training.
        target_modules: names (or their endings) of the linear layers to adapt, one regular expression for the whole
            name, or ``"all-linear"``. None: every linear layer inside the text decoder's layers, found by the
            decoder's path, so that a vision tower, a projector and the head stay as they are.
        exclude_modules: names (or endings), or a regular expression, that are not adapted though they match.
        layers_to_transform: indices of the decoder's layers to adapt; None: all.
        layers_pattern: name of the list of layers that the indices refer to, where that is not plain.
        modules_to_save: modules to train in full and to save with the adapter, such as LLaVA's
            ``["multi_modal_projector"]``.
        init_weights: False starts ``lora_B`` at random instead of zero (for tests).

    Raises:
        ValueError: as ``MixLoRAConfig``, and where a regular expression comes with ``layers_to_transform``.
    """

    pool: Pool = "prompt"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True

    def __post_init__(self):
        PeftConfig.__post_init__(self)
        MixLoRAConfig.__post_init__(self)
        self.peft_type = PEFT_TYPE
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and (
            self.layers_to_transform is not None or self.layers_pattern is not None
        ):
            raise ValueError(
                "layers_to_transform and layers_pattern need target_modules as a list of names (or None), not as the "
                f"expression {self.target_modules!r}; put the layers' indices into the expression"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts, which is not given")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """As in peft; where the weights lie beside the configuration, they are looked at first, so that a broken
        file is refused before a model is touched.

        Raises:
            ValueError: ``adapter_model.safetensors`` is truncated, corrupt, or something else, such as a pickle.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        file = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if file.is_file():  # else it is on the hub, or saved in another format: peft's business
            check_weights_file(file)
        # Read when weights that do not fit are refused: what was injected for them alone is then taken out again.
        config._awaits_weights = True
        return config
