"""Forward: what one forward of a decoder says about its batch, turned into each layer's RoutingContext."""

import torch
from torch import Tensor

from ..config import MixLoRAConfig
from ..routing import Routing, RoutingContext
from .tokens import check_undivided, cumulative_lengths, padding_mask, prompt_mask, segment_starts


class Call:
    """The arguments of a whole model's forward that bear on routing."""

    def __init__(self, labels=None, logits_to_keep=None, task=None, task_mask=None):
        self.labels, self.logits_to_keep = labels, logits_to_keep
        self.task, self.task_mask = task, task_mask


class KeptRouting:
    """The routing found at a prefill, carried by the cache that the prefill filled.

    On the cache, it lives as long as the instances it belongs to, is copied where they are copied, and two
    generations that take turns do not meet.

    Attributes:
        length: tokens of the prefill.
        routings: by (layer, adapter).
    """

    ATTRIBUTE = "_mixlora_routing"

    def __init__(self, length: int, routings: dict[tuple[str, str], Routing]):
        self.length, self.routings = length, routings


class Forward:
    """One forward of a decoder: B rows of L new tokens; both None where the input's shape tells nothing.

    Nothing is worked out before a layer asks, so that disabled adapters cost and refuse nothing.

    Args:
        shape: (B, L), or None.
        named: the decoder's arguments by name.
        call: the whole model's.
        training: whether the decoder trains.
        cached: tokens that were in the cache when the forward began.
        kept: what the cache carries.
    """

    def __init__(self, shape, named: dict, call: Call, training: bool, cached: int, kept: KeptRouting | None):
        self.B, self.L = shape or (None, None)
        self._device = next((value.device for value in named.values() if isinstance(value, Tensor)), None)
        self.call, self.training, self.cached, self.kept = call, training, cached, kept
        self.mask, self.position_ids = named.get("attention_mask"), named.get("position_ids")
        self.cu_seq_lens, self.seq_idx = named.get("cu_seq_lens_q"), named.get("seq_idx")
        self.encoded, self.encoder_mask = named.get("encoder_hidden_states"), named.get("encoder_attention_mask")
        keep = call.logits_to_keep
        self.keep = keep if isinstance(keep, int) and named.get("past_key_values") is not None else 0
        self.routings: dict[tuple[str, str], Routing] = {}
        self._contexts: dict[tuple[str, str, str], RoutingContext] = {}
        self._tokens: tuple[Tensor | None, Tensor | None] | None = None

    def record(self, key: str, name: str, routing: Routing) -> None:
        self.routings[key, name] = routing

    def place(self, key: str, name: str, config: MixLoRAConfig, x: Tensor, rows: list[int] | None):
        """A layer's input in the shape that its instances need, and their context.

        Args:
            key, name: the layer and its adapter.
            x: [B, L, d_in], or flattened [B * L, d_in]; in cross-attention what the encoder gave.
            rows: those of x that have the adapter; None: all.

        Raises:
            ValueError: x does not belong to this forward's tokens, though they matter; or what the forward says
                about them is contradictory, or missing.
        """
        if self._is_encoded(x):
            context = self._context(config)._replace(mask=self._encoder_padding(config), cu_seqlens=None)
            return (x, context) if rows is None else (x[rows], _of_rows(context, rows))
        if rows is not None:
            x = x[rows]
        if self.L is None:
            context = self._context(config)
            return rows_as_instances(x), context if rows is None else _of_rows(context, rows)
        B, fits = self.B if rows is None else len(rows), True
        if x.shape[:-1] != (B, self.L):
            if x.dim() == 2 and x.shape[0] == B * self.L:
                x = x.view(B, self.L, x.shape[-1])
            else:
                fits = False
        if self.cached and config.decode == "prompt":
            return (x if fits else rows_as_instances(x)), RoutingContext(routing=self._kept_routing(key, name, B))
        context = self._context(config)
        if not fits:
            if context.mask is None and context.cu_seqlens is None:
                return rows_as_instances(x), context if rows is None else _of_rows(context, rows)
            raise ValueError(
                f"{key} sees an input of shape {tuple(x.shape)}, the forward's tokens are {(B, self.L)}: which of them "
                "belong to an instance cannot be told, so leave this layer out of target_modules"
            )
        if rows is not None:
            context = _of_rows(context, rows)
        if context.cu_seqlens is not None and B > 1:
            x = x.reshape(1, B * self.L, x.shape[-1])
        return x, context

    def _is_encoded(self, x: Tensor) -> bool:
        """Whether a layer of the decoder sees what the encoder gave. A recomputation may see it under another name."""
        encoded = self.encoded
        return encoded is not None and (
            x is encoded or (x.shape == encoded.shape and x.data_ptr() == encoded.data_ptr() and x.numel() > 0)
        )

    def _encoder_padding(self, config: MixLoRAConfig) -> Tensor | None:
        if self.encoder_mask is None or config.pool == "all":
            return None
        return padding_mask(self.encoder_mask, *self.encoded.shape[:2], 0)

    # One context per kind of adapter, shared by all layers.

    def _context(self, config: MixLoRAConfig) -> RoutingContext:
        kind = (config.routing, config.pool, config.decode)
        context = self._contexts.get(kind)
        if context is None:
            context = self._contexts[kind] = self._find_context(config)
        return context

    def _find_context(self, config: MixLoRAConfig) -> RoutingContext:
        task = task_mask = None
        if config.routing == "task":
            task, task_mask = self.call.task, self.call.task_mask
            if task is None:
                raise ValueError(
                    "an adapter with routing='task' needs the task embedding at every step: pass task_embedding=... "
                    "[B, d_task] or [B, T, d_task] to the model, or generate within "
                    "`with mixlora_kernels.peft.task_embedding(model, ...)`"
                )
        if self.L is None:
            return RoutingContext(task=task, task_mask=task_mask)
        if self.cached and self.L > 1:
            self._check_chunks()
        mask, starts = self._find_tokens()
        if config.pool == "all":
            mask = None
        if config.pool == "prompt" and config.routing == "instance" and not self.cached:
            mask = self._prompt(mask, starts)
        drafted = self.keep - 1  # candidates of an assistant, behind the tokens that are there
        if not self.cached and 0 < drafted < self.L:
            last = torch.arange(self.L, device=self._device) >= self.L - drafted
            if config.decode == "prompt":
                mask = (~last).expand(self.B, -1) if mask is None else mask & ~last
            else:
                starts = last.expand(self.B, -1).clone()
                starts[:, 0] = True
        elif self.cached and self.L > 1 and self.keep == self.L:
            starts = torch.ones(self.B, self.L, dtype=torch.bool, device=self._device)
        cu_seqlens = None if starts is None else cumulative_lengths(starts)
        count = self.B if cu_seqlens is None else len(cu_seqlens) - 1
        task, task_mask = (_expand_rows(tensor, count) for tensor in (task, task_mask))
        return RoutingContext(mask=mask, cu_seqlens=cu_seqlens, task=task, task_mask=task_mask)

    def _find_tokens(self) -> tuple[Tensor | None, Tensor | None]:
        """The new tokens that are not padding, and where packed instances begin, each [B, L] bool or None."""
        if self._tokens is None:
            mask = padding_mask(self.mask, self.B, self.L, self.cached)
            starts = None
            if not self.cached and self.L > 1:
                check_undivided(self.mask, self.L)
                starts = segment_starts(self.position_ids, self.cu_seq_lens, self.seq_idx, mask, self.B, self.L)
            if mask is not None:
                # A row of nothing but padding fills up a batch (generate() makes such masks where every token is the
                # padding's); it is no instance, and routes somehow.
                mask = mask | ~mask.any(1, keepdim=True)
            self._tokens = mask, starts
        return self._tokens

    def _prompt(self, mask: Tensor | None, starts: Tensor | None) -> Tensor | None:
        labels = self.call.labels
        if labels is None:
            if self.training and torch.is_grad_enabled():
                raise ValueError("an adapter with pool='prompt' needs labels to tell the prompt from the answer")
            return mask
        if tuple(labels.shape) != (self.B, self.L):
            raise ValueError(f"labels must have the shape {(self.B, self.L)} of the tokens, got {tuple(labels.shape)}")
        prompt = prompt_mask(labels.to(self._device), starts)
        return prompt if mask is None else mask & prompt

    def _kept_routing(self, key: str, name: str, B: int) -> Routing:
        if self.L > 1:
            self._check_chunks()
        routing = None if self.kept is None else self.kept.routings.get((key, name))
        if routing is None:
            raise ValueError(
                f"the cache holds {self.cached} tokens, but no routing of adapter {name!r} for {key}: it was filled "
                "without this adapter. Start with an empty cache, or use decode='token'"
            )
        kept = routing.index_a.shape[0]
        if kept == 1 and B > 1:  # one instance, continued in several ways
            return Routing(*(tensor.expand(B, -1) for tensor in routing))
        if kept != B:
            raise ValueError(f"the cache was filled for {kept} rows, the forward has {B}")
        return routing

    def _check_chunks(self) -> None:
        """Refuse further prompt tokens behind a prompt of which nothing was decoded yet."""
        verifies = self.keep == self.L  # an assistant's candidates: every one of their logits is wanted
        if self.kept is not None and self.cached <= self.kept.length and not verifies:
            raise ValueError(
                f"{self.L} tokens follow {self.cached} cached ones, of which no token was decoded: a prompt prefilled "
                "in chunks cannot be routed as one instance. Prefill it at once (prefill_chunk_size=None)"
            )


def rows_as_instances(x: Tensor) -> Tensor:
    """An input without a known sequence: each row of [B, d_in] is an instance of one token."""
    return x.unsqueeze(1) if x.dim() == 2 else x


def _of_rows(context: RoutingContext, rows: list[int]) -> RoutingContext:
    if context.cu_seqlens is not None:
        raise ValueError("adapter_names chooses an adapter for each row, which packed instances do not have")
    return RoutingContext(*(None if tensor is None else tensor[rows] for tensor in context[:4]))


def _expand_rows(tensor: Tensor | None, count: int) -> Tensor | None:
    """Repeat each instance's entry as generate() repeats the rows of beams and returned sequences."""
    if tensor is None or tensor.shape[0] == count or count % tensor.shape[0]:
        return tensor
    return tensor.repeat_interleave(count // tensor.shape[0], dim=0)
