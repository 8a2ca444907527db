"""Register the method with peft, and add it to peft's enumeration of methods."""

import importlib.metadata

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from .loading import missing_parameters

LOADING = "_load_pretrained_model"  # the method by which transformers' load_adapter() loads weights

# The methods that the checks of loaded weights hook into. In a version without one of them, a check would silently not
# run.
HOOKS = (
    (BaseTuner, "_remap_adapter_state_dict_for_load"),
    (BaseTuner, "_check_target_module_exists"),
    (AuxiliaryTrainingWrapper, "adapter_state_dict_load_map"),
    (PreTrainedModel, LOADING),
)


def check_hooks() -> None:
    """Raise an ImportError if the installed peft or transformers lacks something that the checks of weights need."""
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
    """Return the member ``PeftType.<name>``, and add it if peft does not have it.

    A plain string instead of a member would fail in transformers, which reads ``peft_type.value``.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        setattr(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    return PeftType(name)


def register(peft_type: PeftType, config_cls: type, model_cls: type[BaseTuner]) -> None:
    """Register the method with peft. A second call changes nothing."""
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=peft_type.value.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
        )
