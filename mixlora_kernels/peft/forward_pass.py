"""ForwardPass: derive each layer's RoutingContext from the arguments of the decoder's forward."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import MixLoRAConfig
from ..routing import Instances, Routing, RoutingContext, find_instances
from .cache import KeptRouting, Past, uncached_error, unknown_cache_error, unseen_cache_error
from .media import find_media, text_of_prompt
from .model_inputs import ModelInputs
from .recorded import Recorded
from .rows import expand_rows, of_rows, rows_as_instances
from .siblings import Siblings
from .tokens import (
    IGNORED,
    MASKS,
    check_undivided,
    check_unmasked,
    cumulative_lengths,
    late_start,
    longer_mask,
    padding_mask,
    prompt_mask,
    segment_starts,
    start_mask,
)

WITHOUT_LABELS = (
    "a training forward of an adapter that routes by the prompt came without labels, so each instance is routed by its "
    "whole sequence, the answer included, while generation routes by the prompt. Let the trainer pass labels to the "
    "model (label smoothing and loss functions of your own take them out), or set pool='sequence' if nothing is "
    "generated"
)


class ForwardPass:
    """One forward of a decoder, with B rows of L new tokens. B and L are 0 if the input's shape does not tell them.

    Everything is computed when the first layer needs it, so that disabled adapters cost nothing and raise no errors.

    Args:
        shape: (B, L), or None.
        named: the decoder's arguments by name.
        inputs: the whole model's arguments.
        training: whether the decoder is in training mode.
        past: what the arguments say about earlier tokens.
    """

    def __init__(
        self, shape: tuple[int, int] | None, named: dict[str, Any], inputs: ModelInputs, training: bool, past: Past
    ):
        self.shape = shape
        self.B, self.L = shape or (0, 0)
        self._device = next((value.device for value in named.values() if isinstance(value, Tensor)), None)
        self.inputs, self.training, self.past, self.cached = inputs, training, past, past.length
        self._masks = {name: named.get(name) for name in MASKS}
        self.mask, self.position_ids = named.get("attention_mask"), named.get("position_ids")
        self.cache_position = named.get("cache_position")
        self.cu_seq_lens, self.seq_idx = named.get("cu_seq_lens_q"), named.get("seq_idx")
        self.encoded: Tensor | None = named.get("encoder_hidden_states")
        self.encoder_mask = named.get("encoder_attention_mask")
        self.keep = 0 if past.cache is None else inputs.logits_to_keep
        self.routings: dict[tuple[str, str], Recorded] = {}
        self.balances: dict[str, float] = {}  # the weight of each adapter's load-balancing loss
        self.siblings = Siblings()
        self._contexts: dict[tuple[str, str, str], RoutingContext] = {}
        self._instances: dict[tuple, Instances] = {}
        self._repeated: set[str] = set()
        self._rows: dict[str, tuple[int, ...] | None] = {}
        self._tokens: tuple[Tensor | None, Tensor | None] | None = None

    def record(self, key: str, name: str, routing: Routing, g: int) -> None:
        """Record a layer's routing: that of its group, and the layer's index g in the group."""
        if (key, name) in self.routings:
            self._repeated.add(key)
        self.routings[key, name] = Recorded(routing, g)

    def keep_routing(self, cache: Any) -> None:
        """Keep the recorded routings in a cache that this forward has filled, for the tokens that follow."""
        prompt = self.L - max(self.keep - 1, 0)
        kept = KeptRouting(prompt, self.routings, frozenset(self._repeated), self._rows)
        setattr(cache, KeptRouting.ATTRIBUTE, kept)

    def prepare(
        self, keys: Sequence[str], name: str, config: MixLoRAConfig, x: Tensor, rows: list[int] | None = None
    ) -> tuple[Tensor, RoutingContext]:
        """Return the input of a layer, or of siblings, in the shape that its instances need, and its context.

        Args:
            keys, name: the layers' names and the adapter's.
            x: [B, L, d_in], or flattened [B * L, d_in]; in cross-attention the encoder's output.
            rows: the rows of x that have the adapter; None: all.

        Raises:
            ValueError: routing depends on the tokens, and x does not have the forward's tokens; or the forward's
                arguments contradict one another, or one is missing.
        """
        self._rows[name] = None if rows is None or len(rows) == self.B else tuple(rows)
        x, context = self._prepare(keys, name, config, x, rows)
        context = context.to(x.device)  # the model's layers may be on several devices
        if rows is not None:
            return x, context
        self.balances[name] = config.balance
        reads_x = context.routing is None and config.routing == "instance"
        place = (_kind(config), self._is_encoded(x), reads_x, x.shape[:-1], x.dtype, x.device)
        instances = self._instances.get(place)
        if instances is None:
            instances = self._instances[place] = find_instances(x, context, reads_x)
        return x, context.with_instances(instances)

    def _prepare(
        self, keys: Sequence[str], name: str, config: MixLoRAConfig, x: Tensor, rows: list[int] | None
    ) -> tuple[Tensor, RoutingContext]:
        if self._is_encoded(x):
            context = self._context(config)
            context = RoutingContext(self._encoder_padding(config), task=context.task, task_mask=context.task_mask)
            return (x, context) if rows is None else (x[rows], of_rows(context, rows))
        if rows is not None:
            x = x[rows]
        if self.shape is None:
            context = self._context(config)
            if self.cached:
                raise ValueError(
                    f"the decoder of {keys[0]} has {self.cached} tokens in its cache, and got neither input_ids nor "
                    "inputs_embeds, so that MixLoRA cannot keep the prompt's routing: leave its layers out of "
                    "target_modules"
                )
            return rows_as_instances(x), context if rows is None else of_rows(context, rows)
        B, fits = self.B if rows is None else len(rows), True
        if x.shape[:-1] != (B, self.L):
            if x.shape[:-1].numel() == B * self.L and (x.dim() == 2 or x.shape[0] == B):
                x = x.reshape(B, self.L, x.shape[-1])
            else:
                fits = False
        if self.cached and config.decode == "prompt":
            if self.L > 1:
                self.past.check_chunks(self.L, verifies=self.keep == self.L)
            routing = self.past.routing_of(keys, name, self._rows[name], B)
            return (x if fits else rows_as_instances(x)), RoutingContext(routing=routing)
        context = self._context(config)
        if not fits:
            # A head that gets the last tokens alone has rows as well, and would be routed by these tokens.
            last = x.dim() == 3 and x.shape[1] == self.inputs.logits_to_keep
            whole = context.mask is None and context.cu_seqlens is None
            if whole and x.shape[0] == B and x.dim() <= 3 and not last:
                return rows_as_instances(x), context if rows is None else of_rows(context, rows)
            raise ValueError(
                f"{keys[0]} gets an input of shape {tuple(x.shape)}, the forward's tokens are {(B, self.L)}: MixLoRA "
                "cannot tell which of them belong to an instance, so leave this layer out of target_modules"
            )
        if rows is not None:
            context = of_rows(context, rows)
        if context.cu_seqlens is not None and B > 1:
            x = x.reshape(1, B * self.L, x.shape[-1])
        return x, context

    def _is_encoded(self, x: Tensor) -> bool:
        """Whether x is the encoder's output. In a recomputation it may be another tensor object with the same
        memory."""
        encoded = self.encoded
        return encoded is not None and (
            x is encoded or (x.shape == encoded.shape and x.data_ptr() == encoded.data_ptr() and x.numel() > 0)
        )

    def _encoder_padding(self, config: MixLoRAConfig) -> Tensor | None:
        if self.encoded is None or self.encoder_mask is None or config.pool == "all":
            return None
        return padding_mask(self.encoder_mask, self.encoded.shape[0], self.encoded.shape[1], 0)

    # All layers whose adapters are of one kind share one context.

    def _context(self, config: MixLoRAConfig) -> RoutingContext:
        kind = _kind(config)
        context = self._contexts.get(kind)
        if context is None:
            context = self._contexts[kind] = self._find_context(config)
        return context

    def _find_context(self, config: MixLoRAConfig) -> RoutingContext:
        task = task_mask = None
        if config.routing == "task":
            task, task_mask = self.inputs.task, self.inputs.task_mask
            if task is None:
                raise ValueError(
                    "an adapter with routing='task' needs the task embedding at every step: pass task_embedding=... "
                    "[B, d_task] or [B, T, d_task] to the model, or generate within "
                    "`with mixlora_kernels.peft.task_embedding(model, ...)`"
                )
        self._check_past(config)
        if self.shape is None:
            if config.routing == "instance" and config.pool != "all":
                check_unmasked(self._masks)
            return RoutingContext(task=task, task_mask=task_mask)
        if self.cached and self.L > 1:
            self.past.check_chunks(self.L, verifies=self.keep == self.L)
        mask, starts = self._find_tokens()
        if config.pool == "all":
            mask = None
        if config.pool in ("prompt", "text") and config.routing == "instance" and not self.cached:
            mask = self._prompt(mask, starts)
            if config.pool == "text":
                media = find_media(self.inputs.media_ids, self.inputs.input_ids)
                mask = text_of_prompt(media, mask, starts, (self.B, self.L))
        drafted = self.keep - 1  # an assistant's candidate tokens, which follow the accepted ones
        if not self.cached and 0 < drafted < self.L:
            last = self._last(drafted)
            if config.decode == "prompt":
                mask = (~last).expand(self.B, -1) if mask is None else mask & ~last
            else:
                starts = last.expand(self.B, -1).clone()
                starts[:, 0] = True
        elif self.cached and self.L > 1 and self.keep == self.L:
            starts = torch.ones(self.B, self.L, dtype=torch.bool, device=self._device)
        cu_seqlens = None
        if starts is not None:
            cu_seqlens = cumulative_lengths(starts)
            mask = None if mask is None else mask.reshape(1, -1)  # of the rows end to end
        elif self.inputs.repeats_task:
            task, task_mask = (expand_rows(tensor, self.B) for tensor in (task, task_mask))
        return RoutingContext(mask=mask, cu_seqlens=cu_seqlens, task=task, task_mask=task_mask)

    def _last(self, count: int) -> Tensor:
        """A mask of the last ``count`` new tokens, [L] bool."""
        return torch.arange(self.L, device=self._device) >= self.L - count

    def _check_past(self, config: MixLoRAConfig) -> None:
        """Refuse a forward that continues a sequence without a cache that holds the routing of its prompt."""
        if self.past.unknown is not None:
            raise unknown_cache_error(self.past.unknown)
        if self.inputs.continues and config.routing != "task":
            raise uncached_error()
        if self.cached or self.shape is None or not self.inputs.generates:
            return
        evidence = longer_mask(self.mask, self.L) if self.past.cache is None else None
        evidence = evidence or late_start(self.position_ids, self.cache_position, self.L)
        if evidence is not None:
            raise unseen_cache_error(evidence, self.training)

    def _find_tokens(self) -> tuple[Tensor | None, Tensor | None]:
        """The new tokens that are not padding, and the first tokens of packed instances, each [B, L] bool or None."""
        if self._tokens is None:
            mask = padding_mask(self.mask, self.B, self.L, self.cached)
            starts = None
            if not self.cached and self.L > 1:
                check_undivided(self.mask, self.L)
                starts = segment_starts(self.position_ids, self.cu_seq_lens, self.seq_idx, mask, self.B, self.L)
            if mask is not None:
                # A row of padding alone fills up a batch. generate() makes such a mask if all tokens are the padding
                # token. The row is no instance, but needs a mean, so the mean runs over all its tokens.
                mask = mask | ~mask.any(1, keepdim=True)
            self._tokens = mask, starts
        return self._tokens

    def _prompt(self, mask: Tensor | None, starts: Tensor | None) -> Tensor | None:
        """The tokens of each instance's prompt, [B, L] bool, if the forward's arguments tell it; else ``mask``.

        Raises:
            ValueError: the labels have another number of tokens than the input.
        """
        labels, answer = self.inputs.labels, self.inputs.logits_to_keep - 1
        if labels is not None:
            if tuple(labels.shape) != (self.B, self.L):
                raise ValueError(
                    f"labels must have the shape {(self.B, self.L)} of the tokens, got {tuple(labels.shape)}"
                )
            labels = labels.to(self._device)
            return prompt_mask(labels, mask, starts) if self.encoded is None else start_mask(labels, mask)
        if self.past.cache is None and starts is None and 0 < answer < self.L - 1:
            # Without labels (TRL's GRPO before 1.15): logits are computed for the answer's tokens, which come last, and
            # for the token before them.
            labels = torch.where(self._last(answer), 0, IGNORED).expand(self.B, -1)
            return prompt_mask(labels, mask, starts)
        if self.training and self.inputs.generates and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            warnings.warn(WITHOUT_LABELS, stacklevel=2)
        return mask


def _kind(config: MixLoRAConfig) -> tuple[str, str, str]:
    """The settings of an adapter that its context depends on."""
    return config.routing, config.pool, config.decode
