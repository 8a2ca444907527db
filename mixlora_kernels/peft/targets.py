"""Which layers to adapt: find the default targets, and check the user's."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from .config import ConditionalMixLoRAConfig
from .linears import adaptable_linears, expert_modules, is_linear, outside_adapters, read_weights


def choose_targets(model: nn.Module, config: ConditionalMixLoRAConfig) -> None:
    """Replace ``target_modules`` that are None or ``"all-linear"`` by the layers that they mean in this model.

    Warns of experts that are not adapted.

    Raises:
        ValueError: as ``decoder_linears``.
    """
    if config.target_modules is None:
        config.target_modules = decoder_linears(model, config)
        config.layers_to_transform = config.layers_pattern = None  # the expression contains these settings
    elif is_all_linear(config.target_modules):
        config.target_modules = all_linears(model)
    else:
        return
    if beside := left_alone(model):
        kinds = Counter((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), what) for name, what in beside.items())
        named = "; ".join(f"{name} ({count}): {what}" for (name, what), count in kinds.items())
        warnings.warn(
            f"{len(beside)} mixtures of experts and the routers that choose among their experts stay as they are, "
            f"because MixLoRA cannot adapt experts ({named}); the other linear layers are adapted",
            stacklevel=2,
        )


def is_all_linear(targets: Any) -> TypeGuard[str]:
    return isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def left_alone(model: nn.Module) -> dict[str, str]:
    """The experts of the text decoder that are not adapted, by name, each with a description."""
    decoders = set(find_decoders(model))
    paths = [name for name, module in model.named_modules() if module in decoders]
    return {
        name: what
        for name, what in expert_modules(model).items()
        if any(not path or name.startswith(f"{path}.") for path in paths)
        and not any(isinstance(module, BaseTunerLayer) for module in model.get_submodule(name).modules())
    }


def all_linears(model: nn.Module) -> set[str]:
    """The names of all linear layers that can be adapted, except the head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {name for name in adaptable_linears(model) if model.get_submodule(name) is not head}


def decoder_linears(model: nn.Module, config: ConditionalMixLoRAConfig) -> str:
    """A regular expression for every linear layer inside the text decoder's layers, or the encoder's if there is no
    decoder.

    The expression contains the decoder's path, because vision towers use the same names for their layers. Layers that
    cannot be adapted are not included (see ``linears.adaptable_linears``).

    Raises:
        ValueError: the model has no ``get_decoder``, the decoder has no list of layers, or the requested layers do not
            exist.
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
    adaptable = adaptable_linears(decoder)
    inside: dict[bool, set[str]] = {}  # paths below a layer, by whether they are linear layers to adapt
    for name, _ in outside_adapters(decoder):
        head = next((head for head in lists if name.startswith(f"{head}.")), name)
        index, _, rest = name[len(head) + 1 :].partition(".")
        if rest and (not indices or int(index) in indices):
            inside.setdefault(name in adaptable, set()).add(rest)
    adapted = inside.get(True, set()) - inside.get(False, set())
    if not adapted:
        raise ValueError(
            f"no linear layers in {type(decoder).__name__}.{'|'.join(lists)}"
            + (f" with layers_to_transform={config.layers_to_transform}" if indices else "")
        )
    which = "|".join(map(str, sorted(indices))) if indices else r"\d+"
    places = "|".join(map(re.escape, sorted(adapted)))
    prefix = re.escape(path) + r"\." if path else ""
    return rf"{prefix}({'|'.join(map(re.escape, lists))})\.({which})\.({places})"


def _lists_of_layers(decoder: nn.Module) -> list[str]:
    """The paths of the outermost lists of modules: ``layers`` of a LLaMA, ``encoder.layer`` of a BERT."""
    lists = [name for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    depth = min((name.count(".") for name in lists), default=0)
    return [name for name in lists if name.count(".") == depth]


def check_targets(model: nn.Module, config: ConditionalMixLoRAConfig, matches: Callable) -> None:
    """Check the targets before a layer is replaced.

    Raises:
        ValueError: no module has a target's name, a target is not a linear layer, or it is one whose weight another
            module reads without calling it.
    """
    targets = config.target_modules
    if targets == DUMMY_TARGET_MODULES:
        return
    modules = outside_adapters(model)
    if targets is not None and not isinstance(targets, str):
        unknown = sorted(
            target for target in targets if not any(f".{name}".endswith(f".{target}") for name, _ in modules if name)
        )
        if unknown:
            raise ValueError(f"Target modules {unknown} not found in the base model {type(model).__name__}")
    reading = read_weights(model)
    for name, module in modules:
        if not name or not matches(config, name):
            continue
        if not is_linear(module):
            raise ValueError(
                f"Target module {name} is not supported: MixLoRA adapts linear layers, got {type(module).__name__}"
            )
        if name in reading:
            raise ValueError(
                f"Target module {name} is not supported: {reading[name]} reads its weight and does not call it, so "
                f"that an adapter in it has no effect. Add {name!r} to exclude_modules, or leave it out of "
                "target_modules"
            )


def find_decoders(model: nn.Module) -> list[nn.Module]:
    """The modules whose forward receives the mask and the positions of the tokens: the text decoder, followed by the
    encoder if the model has both; or the model itself if it is not a transformers model."""
    of_transformers: Any = model  # whose methods nn.Module does not declare
    if not hasattr(model, "get_decoder"):
        return [model]
    decoder = of_transformers.get_decoder()
    while _has_both(decoder):  # BLIP-2 and Florence-2 give their whole T5 or BART
        decoder = decoder.get_decoder()
    # The encoder stands beside the decoder, in the model or in a part of it.
    modules: Iterable[Any] = model.modules()
    owners = [module for module in modules if _has_both(module) and module.get_decoder() is decoder]
    return [decoder, *(owner.get_encoder() for owner in owners[:1])]


def _has_both(module: Any) -> bool:
    """Whether a module consists of an encoder and a decoder."""
    of_both = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    # BART's encoder and decoder have BART's configuration, and each gives itself for what it lacks.
    return (
        of_both
        and hasattr(module, "get_decoder")
        and module.get_decoder() is not module
        and module.get_encoder() is not module
    )
