"""A decoder's cache of keys and values: found by what it is, whatever name transformers hands it over by.

The name has changed (``past_key_values`` up to transformers 5.23, ``cache`` from 5.24 on). A cache that went unseen
would let every generated token be routed anew, so what looks like a cache and is none that is known is refused.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import Cache

from .recorded import Recorded

PLAIN = (Tensor, bool, int, float, str, type(None))  # what is no cache, whatever it is called
# Under these names models hand over states that are no ``Cache``: tuples of tensors, say.
NAMES = ("cache", "past_key_values", "cache_params", "mems", "state")


class KeptRouting:
    """The routing found at a prefill, carried by the cache that the prefill filled.

    On the cache, it lives as long as the instances it belongs to, is copied where they are copied, and two
    generations that take turns do not meet.

    Attributes:
        length: tokens of the prefill.
        routings: by (layer, adapter).
    """

    ATTRIBUTE = "_mixlora_routing"

    def __init__(self, length: int, routings: dict[tuple[str, str], Recorded]):
        self.length, self.routings = length, routings


class Past(NamedTuple):
    """What a decoder was handed of the tokens before the ones it gets now.

    Attributes:
        cache: its cache; None: there is none, or an unknown one.
        length: tokens in the cache.
        kept: the routing that the cache carries.
        unknown: the argument that is a cache of an unknown kind, as "name (type)".
    """

    cache: object | None = None
    length: int = 0
    kept: KeptRouting | None = None
    unknown: str | None = None


def find_cache(values: Iterable[Any]) -> Any:
    """The first cache among ``values``: a transformers ``Cache``, or another object that tells its length."""
    for value in values:
        if isinstance(value, Cache) or hasattr(type(value), "get_seq_length"):
            return value
    return None


def find_past(named: Mapping[str, Any], new_tokens: int | None) -> Past:
    """What a decoder's arguments, by name, say of earlier tokens; ``new_tokens`` is the length of its input."""
    cache = find_cache(named.values())
    if cache is None:
        return Past(unknown=_unknown_cache(named))
    kept = getattr(cache, KeptRouting.ATTRIBUTE, None)
    return Past(cache, _length(cache, kept, new_tokens), kept)


def unseen_cache_error(evidence: str) -> ValueError:
    """The error for a forward that continues a sequence of which the method cannot find the cache."""
    return ValueError(
        f"{evidence}, so the forward continues a sequence, but the decoder was handed no cache with tokens in it, and "
        f"MixLoRA cannot find the prompt's routing. transformers {transformers.__version__} may hand the cache over in "
        "a way that this version of mixlora_kernels does not know: install a version of transformers that it was "
        "tested with. In a loop of your own, pass the cache of the first forward on to the next"
    )


def unknown_cache_error(unknown: str) -> ValueError:
    """The error for a cache whose rows are not the instances, such as the paged one of continuous batching."""
    return ValueError(
        f"the decoder was handed {unknown}, a kind of cache that does not tell which tokens belong to an instance, so "
        "that MixLoRA cannot keep a prompt's routing. generate_batch() and `transformers serve` use such a cache "
        f"(transformers {transformers.__version__}): use model.generate() with a padded batch instead"
    )


def _unknown_cache(named: Mapping[str, Any]) -> str | None:
    for name, value in named.items():
        if isinstance(value, PLAIN):
            continue
        if name in NAMES or "cache" in type(value).__name__.lower():
            return f"{name} ({type(value).__name__})"
    return None


def _length(cache: Any, kept: KeptRouting | None, new_tokens: int | None) -> int:
    length = cache.get_seq_length()
    if isinstance(length, Tensor):
        if torch.compiler.is_compiling():
            # A static cache counts on the device. Only single steps are compiled, never a prefill.
            return 0 if kept is None or new_tokens != 1 else kept.length + 1
        length = int(length)
    return length
