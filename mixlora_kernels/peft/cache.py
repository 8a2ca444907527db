"""Find a decoder's cache of keys and values, by its type and not by the name of its argument.

The name has changed: ``past_key_values`` up to transformers 5.23, ``cache`` from 5.24 on. If the cache were missed,
    each
generated token would be routed anew. Therefore an argument that looks like a cache of an unknown kind is refused.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import Cache

from .recorded import Recorded

PLAIN = (Tensor, bool, int, float, str, type(None))  # types that are never a cache
# Models pass states that are no ``Cache``, such as tuples of tensors, under these names.
NAMES = ("cache", "past_key_values", "cache_params", "mems", "state")


class KeptRouting:
    """The routing of a prefill. It is kept as an attribute of the cache that the prefill filled.

    There it lives as long as the cache, is copied with it, and is separate for each of several generations that
    alternate.

    Attributes:
        length: number of tokens of the prefill.
        routings: the routing of each layer, by (layer, adapter).
    """

    ATTRIBUTE = "_mixlora_routing"

    def __init__(self, length: int, routings: dict[tuple[str, str], Recorded]):
        self.length, self.routings = length, routings


class Past(NamedTuple):
    """What a decoder's arguments say about earlier tokens.

    Attributes:
        cache: the cache; None: there is none, or one of an unknown kind.
        length: number of tokens in the cache.
        kept: the routing that the cache holds.
        unknown: an argument that is a cache of an unknown kind, as "name (type)".
    """

    cache: object | None = None
    length: int = 0
    kept: KeptRouting | None = None
    unknown: str | None = None


def find_cache(values: Iterable[Any]) -> Any:
    """The first cache among ``values``: a transformers ``Cache``, or an object with its ``get_seq_length``."""
    for value in values:
        if isinstance(value, Cache) or hasattr(type(value), "get_seq_length"):
            return value
    return None


def find_past(named: Mapping[str, Any], new_tokens: int | None) -> Past:
    """Find what a decoder's arguments, by name, say about earlier tokens. ``new_tokens`` is the length of its input."""
    cache = find_cache(named.values())
    if cache is None:
        return Past(unknown=_unknown_cache(named))
    kept = getattr(cache, KeptRouting.ATTRIBUTE, None)
    return Past(cache, _length(cache, kept, new_tokens), kept)


def unseen_cache_error(evidence: str) -> ValueError:
    """The error for a forward that continues a sequence, if the method does not find its cache."""
    return ValueError(
        f"{evidence}, so the forward continues a sequence, but the decoder got no cache with tokens in it, and "
        f"MixLoRA cannot find the prompt's routing. transformers {transformers.__version__} may hand the cache over in "
        "a way that this version of mixlora_kernels does not know: install a version of transformers that it was "
        "tested with. In a loop of your own, pass the cache of the first forward on to the next"
    )


def unknown_cache_error(unknown: str) -> ValueError:
    """The error for a cache whose rows are not instances, such as the paged cache of continuous batching."""
    return ValueError(
        f"the decoder got {unknown}, a kind of cache that does not tell which tokens belong to an instance, so "
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
            # A static cache keeps its length on the device. Only single steps are compiled, never a prefill.
            return 0 if kept is None or new_tokens != 1 else kept.length + 1
        length = int(length)
    return length
