"""Find a decoder's cache of keys and values, by its type and not by the name of its argument.

The name has changed: ``past_key_values`` up to transformers 5.23, ``cache`` from 5.24 on. If the cache were missed,
each generated token would be routed anew. Therefore an argument that looks like a cache of an unknown kind is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import Cache

from ..routing import Routing
from .recorded import Recorded, join

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
        repeated: the layers that ran more than once in the prefill, of which only the last routing is known.
        rows: the rows of the prefill that had each adapter, by its name; None: all.
        seen: number of tokens that followed the prefill.
    """

    ATTRIBUTE = "_mixlora_routing"

    def __init__(
        self, length: int, routings: dict[tuple[str, str], Recorded], repeated: frozenset[str],
        rows: dict[str, tuple[int, ...] | None],
    ):  # fmt: skip
        self.length, self.routings, self.repeated, self.rows, self.seen = length, routings, repeated, rows, 0


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

    def note_step(self, tokens: int) -> None:
        """Count tokens that followed the prefill."""
        if self.kept is not None and not torch.compiler.is_compiling():  # each number would compile another graph
            self.kept.seen += tokens

    def check_chunks(self, tokens: int, verifies: bool) -> None:
        """Refuse further tokens of a prompt after its first chunk, which shows in that no token was decoded yet.

        Args:
            tokens: of the running forward.
            verifies: whether these are an assistant's candidates, all of whose logits are computed.
        """
        kept = self.kept
        if kept is None or verifies or self.length > kept.length or (self.length == kept.length and kept.seen):
            return
        raise ValueError(
            f"{tokens} tokens follow {self.length} cached ones, of which no token was decoded: a prompt prefilled in "
            "chunks cannot be routed as one instance. Prefill it at once (prefill_chunk_size=None). A turn after an "
            "answer of one token, and an assistant model with a MixLoRA adapter, look the same: start the turn with an "
            "empty cache, and assist with a model without such an adapter"
        )

    def routing_of(self, keys: Sequence[str], name: str, rows: tuple[int, ...] | None, count: int) -> Routing:
        """The routing that the prefill found for the G layers, [G, count, ...].

        Args:
            keys, name: the layers' names and the adapter's.
            rows: the rows of the forward that have the adapter; None: all. ``count`` is their number.

        Raises:
            ValueError: the prefill found none, or none for these rows, or several.
        """
        routings = {} if self.kept is None else self.kept.routings
        found = [routings[key, name] for key in keys if (key, name) in routings]
        if self.kept is None or len(found) < len(keys):
            lacking = next(key for key in keys if (key, name) not in routings)
            raise ValueError(
                f"the cache holds {self.length} tokens, but no routing of adapter {name!r} for {lacking}: it was "
                "filled without this adapter. Start with an empty cache, or use decode='token'"
            )
        if self.length < self.kept.length:
            raise ValueError(
                f"the cache holds {self.length} tokens of a prompt of {self.kept.length}, whose routing is of all of "
                "them: compute the shorter prompt anew"
            )
        if not self.kept.repeated.isdisjoint(keys):
            raise ValueError(
                f"{keys[0]} runs more than once in a forward, so that MixLoRA cannot keep its routing for generated "
                "tokens: leave it out of target_modules, or use decode='token'"
            )
        routing = join(found)
        kept_count, kept_rows = routing.index_a.shape[-2], self.kept.rows.get(name)
        if kept_count == 1 and kept_rows is None:  # one instance, perhaps with several continuations
            return Routing(*(tensor.expand(-1, count, -1) for tensor in routing))
        if kept_count != count:
            raise ValueError(f"the cache was filled for {kept_count} rows, the forward has {count}")
        if kept_rows != rows:
            raise ValueError(
                f"adapter {name!r} had the rows {kept_rows or 'all'} when the cache was filled, and has "
                f"{rows or 'all'} now: give adapter_names in the order of the prompts"
            )
        return routing


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


def unseen_cache_error(evidence: str, training: bool = False) -> ValueError:
    """The error for a forward that continues a sequence, if the method does not find its cache."""
    if training:
        return ValueError(
            f"{evidence}, so the forward continues a sequence, but the decoder got no cache with tokens in it: in "
            "training mode, gradient checkpointing turns the cache off. Call model.eval() before model.generate()"
        )
    return ValueError(
        f"{evidence}, so the forward continues a sequence, but the decoder got no cache with tokens in it, and "
        f"MixLoRA cannot find the prompt's routing. transformers {transformers.__version__} may hand the cache over in "
        "a way that this version of mixlora_kernels does not know: install a version of transformers that it was "
        "tested with. In a loop of your own, pass the cache of the first forward on to the next"
    )


def uncached_error() -> ValueError:
    """The error for generating without a cache, where no forward knows which of its tokens were the prompt."""
    return ValueError(
        "a forward without a cache (use_cache=False) continues the tokens of the one before it, and MixLoRA cannot "
        "tell which of them are the prompt, whose routing a generated token keeps: generate with use_cache=True. To "
        "score a text that grows token by token, leave use_cache out"
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
    try:
        length = cache.get_seq_length()
    except ValueError:  # a cache of states alone, such as Mamba's, does not know; only single tokens follow in it
        return 0 if kept is None or new_tokens != 1 else kept.length + kept.seen
    if isinstance(length, Tensor):
        if torch.compiler.is_compiling():
            # A static cache keeps its length on the device. Only single steps are compiled, never a prefill.
            return 0 if kept is None or new_tokens != 1 else kept.length + 1
        length = int(length)
    return length
