"""Register the method with peft, whose enumeration of methods has to be extended for it."""

import importlib.metadata

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from .loading import missing_parameters

LOADING = "_load_pretrained_model"  # of a transformers model: what its load_adapter() loads weights by

# What the checks of loaded weights are hung on. A version without one of these would skip them without a word.
HOOKS = (
    (BaseTuner, "_remap_adapter_state_dict_for_load"),
    (BaseTuner, "_check_target_module_exists"),
    (AuxiliaryTrainingWrapper, "adapter_state_dict_load_map"),
    (PreTrainedModel, LOADING),
)


def check_hooks() -> None:
    """Raise an ImportError where the installed peft or transformers lacks what weights are checked by."""
    lacking = [(owner, name) for owner, name in HOOKS if not hasattr(owner, name)]
    lacking += [(owner, f"{name}({parameter})") for owner, name, parameter in missing_parameters()]
    for owner, name in lacking:
        package = owner.__module__.partition(".")[0]
        version = importlib.metadata.version(package)
        raise ImportError(
            f"mixlora_kernels.peft does not know {package} {version}: without {owner.__name__}.{name}, weights would "
            "be loaded unchecked. See constraints.txt for the versions that were tested"
        )


def add_peft_type(name: str) -> PeftType:
    """The member ``PeftType.<name>``, added where peft does not have it.

    A bare string in its place goes a long way and then fails where transformers asks for ``peft_type.value``.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        setattr(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    return PeftType(name)


def register(peft_type: PeftType, config_cls: type, model_cls: type[BaseTuner]) -> None:
    """Enter the method in peft's tables; a second import of this package changes nothing."""
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=peft_type.value.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
        )
