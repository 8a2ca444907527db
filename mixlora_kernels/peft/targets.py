"""Which layers to adapt: the default choice, and a check of everybody's."""

import re
from collections.abc import Callable

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import ConditionalMixLoRAConfig
from .side_information import find_decoders


def decoder_linears(model: nn.Module, config: ConditionalMixLoRAConfig) -> str:
    """An expression for every linear layer inside the text decoder's layers (an encoder's, of a model without one).

    The decoder is found by its place in the model: vision towers use the same names for their layers.

    Raises:
        ValueError: the model has no ``get_decoder``, or no list of layers there, or the layers wanted do not exist.
    """
    ask = "give target_modules"
    if not hasattr(model, "get_decoder"):
        raise ValueError(f"Please specify `target_modules`: {type(model).__name__} has no get_decoder(), so {ask}")
    decoder = find_decoders(model)[0]
    path = next(name for name, module in model.named_modules() if module is decoder)
    lists = _lists_of_layers(decoder)
    wanted = config.layers_pattern
    if wanted:
        wanted = [wanted] if isinstance(wanted, str) else wanted
        lists = [name for name in lists if name in wanted or name.rpartition(".")[2] in wanted]
    if not lists:
        raise ValueError(f"Please specify `target_modules`: {type(decoder).__name__} has no list of layers, so {ask}")
    indices = config.layers_to_transform
    indices = [indices] if isinstance(indices, int) else indices
    inside = {}  # what stands below a layer, by whether it is linear
    for name, module in _outside_adapters(decoder):
        head = next((head for head in lists if name.startswith(f"{head}.")), name)
        index, _, rest = name[len(head) + 1 :].partition(".")
        if rest and (not indices or int(index) in indices):
            inside.setdefault(is_linear(module), set()).add(rest)
    if not inside.get(True):
        raise ValueError(
            f"no linear layers in {type(decoder).__name__}.{'|'.join(lists)}"
            + (f" with layers_to_transform={config.layers_to_transform}" if indices else "")
        )
    which = "|".join(map(str, sorted(indices))) if indices else r"\d+"
    places = "|".join(map(re.escape, sorted(inside[True])))
    prefix = re.escape(path) + r"\." if path else ""
    return rf"{prefix}({'|'.join(map(re.escape, lists))})\.({which})\.({places})"


def _lists_of_layers(decoder: nn.Module) -> list[str]:
    """The paths of the outermost lists of modules: ``layers`` of a LLaMA, ``encoder.layer`` of a BERT."""
    lists = [name for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    depth = min((name.count(".") for name in lists), default=0)
    return [name for name in lists if name.count(".") == depth]


def check_targets(model: nn.Module, config: ConditionalMixLoRAConfig, matches: Callable) -> None:
    """Raise a ValueError for names that no module has, and for targets that are not linear layers."""
    targets = config.target_modules
    if targets == DUMMY_TARGET_MODULES or (
        isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
    ):
        return
    modules = _outside_adapters(model)
    if not isinstance(targets, str):
        unknown = sorted(
            target for target in targets if not any(f".{name}".endswith(f".{target}") for name, _ in modules if name)
        )
        if unknown:
            raise ValueError(f"Target modules {unknown} not found in the base model {type(model).__name__}")
    for name, module in modules:
        if name and matches(config, name) and not is_linear(module):
            raise ValueError(
                f"Target module {name} is not supported: MixLoRA adapts linear layers, got {type(module).__name__}"
            )


def is_linear(module: nn.Module) -> bool:
    """Whether a module maps [..., d_in] to [..., d_out]: ``nn.Linear``, its quantised kin, GPT-2's ``Conv1D``."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    has_sizes = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    return has_sizes and "Linear" in type(module).__name__


def _outside_adapters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules by name, without what lies inside of adapted layers."""
    found, inside = [], ()
    for name, module in model.named_modules():
        if not name.startswith(inside or ("\0",)):
            found.append((name, module))
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, name + ".")
    return found
