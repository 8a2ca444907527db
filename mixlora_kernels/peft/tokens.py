"""Find which tokens belong to which instance, from the arguments that transformers passes to a decoder.

Alphabet: B rows of L new tokens each, after ``offset`` tokens that are in the cache.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .cache import unseen_cache_error

IGNORED = -100  # the label of a token that the model does not learn to predict
#: The arguments of models of sounds and pictures that say where their input is padding.
MASKS = ("attention_mask", "pixel_attention_mask", "padding_mask")
FIRST = 1  # the highest first position of a sequence: most models count from 0, PaliGemma from 1


def padding_mask(mask: Any, B: int, L: int, offset: int) -> Tensor | None:
    """The new tokens that are not padding, [B, L] bool; None: all.

    Args:
        mask: the decoder's ``attention_mask``: None; [B, offset + L]; [B, 1, L, K] (with a static cache), True or 0
            where query i attends to key j; or a dictionary of these by kind of attention layer.

    Raises:
        TypeError: the mask is of another type.
        ValueError: the mask does not fit B and L.
    """
    mask = _of_full_attention(mask)
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor for MixLoRA to find the padding, got {type(mask).__name__}")
    if mask.dim() == 2 and mask.shape[0] == B and mask.shape[1] >= L:
        return mask[:, mask.shape[1] - L :] != 0
    if mask.dim() == 4 and mask.shape[0] in (1, B) and mask.shape[2] == L and mask.shape[3] >= offset + L:
        # Every token but padding attends to itself, so the diagonal shows which tokens are padding.
        own = mask.diagonal(offset, 2, 3)[:, 0, :L]
        own = own == 0 if own.is_floating_point() else own != 0
        return own.expand(B, L)
    raise ValueError(
        f"attention_mask must have the shape [B, tokens] or [B, 1, L, tokens] for B={B} and L={L} new tokens, "
        f"got {tuple(mask.shape)}"
    )


def check_undivided(mask: Any, L: int) -> None:
    """Refuse an attention mask [B, 1, L, K] that divides a row into several instances.

    Raises:
        ValueError: a token does not attend to the one before it, though neither is padding.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4 or not _may_look():
        return
    sees = mask == 0 if mask.is_floating_point() else mask != 0
    own, previous = sees.diagonal(0, 2, 3)[..., :L], sees.diagonal(-1, 2, 3)
    if bool((own[..., 1:] & own[..., :-1] & ~previous).any()):
        raise ValueError(
            "attention_mask divides the tokens of a row into several instances: for packed instances give "
            "position_ids that start anew (or cu_seq_lens_q, or seq_idx) and no attention_mask"
        )


def check_unmasked(masks: Mapping[str, Any]) -> None:
    """Refuse padding in a model whose input is not tokens, such as sounds: its mask does not fit the hidden states.

    Args:
        masks: a forward's arguments of the names in ``MASKS``.

    Raises:
        ValueError: one of them masks something.
    """
    if torch.compiler.is_compiling():  # a compiled graph cannot branch on values
        return
    for name, mask in masks.items():
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool((mask != 0).all()):
            raise ValueError(
                f"{name} marks padding in an input that is not tokens, and MixLoRA cannot tell which hidden states are "
                "padding: give inputs of one length, or set pool='all' to let the routers read the padding too"
            )


def segment_starts(
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    seq_idx: Tensor | None,
    mask: Tensor | None,
    B: int,
    L: int,
) -> Tensor | None:
    """Find the first token of each packed instance, [B, L] bool; None if every row is one instance.

    Args:
        position_ids: [B, L] or [1, L]: an instance begins where they do not rise by one. [4, B, L]: the first are the
            text's positions, the others are an image's three dimensions. [3, B, L] says nothing about packing.
        cu_seq_lens: [S + 1], the index of each segment's first token among all B * L tokens, and B * L at the end.
        seq_idx: [B, L], the number of each token's segment.
        mask: the tokens that are not padding. transformers separates packed instances only if there is no mask.

    Raises:
        ValueError: the arguments contradict one another.
    """
    found = {}
    positions = _text_positions(position_ids, B, L)
    if positions is not None and mask is None:
        found["position_ids"] = _changes(positions.diff(dim=1) != 1)
    if cu_seq_lens is not None:
        found["cu_seq_lens_q"] = _starts_of(cu_seq_lens, B, L)
    if seq_idx is not None:
        if tuple(seq_idx.shape) != (B, L):
            raise ValueError(f"seq_idx must have the shape {(B, L)} of the tokens, got {tuple(seq_idx.shape)}")
        found["seq_idx"] = _changes(seq_idx.diff(dim=1) != 0)
    look = _may_look()
    if mask is not None:
        if positions is not None and look and _restarts_within(positions, mask):
            raise ValueError(
                "position_ids start anew among tokens that attention_mask marks as one instance: for packed instances "
                "give no attention_mask, for one instance let position_ids rise"
            )
        for name, starts in found.items():
            if look and starts[:, 1:].any():
                raise ValueError(
                    f"{name} says that a row holds several instances, attention_mask that it holds one: for packed "
                    "instances give no attention_mask"
                )
        return None
    names = list(found)
    for name in names[1:]:
        if look and not torch.equal(found[names[0]], found[name]):
            raise ValueError(f"{names[0]} and {name} contradict one another about where packed instances begin")
    if not found:
        return None
    starts = found[names[0]]
    several = starts[:, 1:].any()
    if positions is None or not look:
        return starts if bool(several) else None
    several, late = torch.stack((several, (positions.masked_fill(~starts, 0) > FIRST).any())).tolist()  # one look
    if late:
        raise unseen_cache_error("the position_ids of an instance start above 0")
    return starts if several else None


def longer_mask(mask: Any, L: int) -> str | None:
    """Describe how an attention mask shows that tokens precede the L new ones; None if it does not."""
    mask = _of_full_attention(mask)
    if isinstance(mask, Tensor) and mask.dim() in (2, 4) and mask.shape[-1] > L:
        return f"attention_mask has {mask.shape[-1]} tokens for an input of {L}"
    return None


def late_start(position_ids: Any, cache_position: Any, L: int) -> str | None:
    """Describe how positions show that tokens precede the L new ones; None if they do not.

    They show it if no token, padding included, has the position at which a sequence begins. (Rows padded on the left
    may count padding or not.) On a GPU the positions are only read if L is 1, because a single token without a cache is
    almost always a mistake.
    """
    for name, positions in (("position_ids", position_ids), ("cache_position", cache_position)):
        if not isinstance(positions, Tensor) or positions.numel() == 0 or not _may_look():
            continue
        if positions.device.type != "cpu" and L > 1:
            continue
        first = int(positions.min())
        if first > (0 if L == 1 else FIRST):
            return f"{name} start at {first}"
    return None


def prompt_mask(labels: Tensor, mask: Tensor | None, starts: Tensor | None) -> Tensor:
    """The prompt of each instance, [B, L] bool: the tokens before its first answer token, according to labels [B, L].
    If an instance has no prompt: all its tokens that are not padding.

    Later turns are not part of the prompt, because they did not exist when the first answer was generated. The first
    token alone does not count as a prompt: no token predicts it, so its label has no meaning, and collators that pack
    set it in different ways.
    """
    B, L = labels.shape
    answer = (labels != IGNORED).flatten()
    real = torch.ones_like(answer) if mask is None else mask.flatten()
    instance = instance_of_token(B, L, starts, labels.device)
    # The number of answer tokens up to each token. The prompt ends where it exceeds the number before the instance.
    count = answer.cumsum(0)
    begin = torch.full_like(count, count.numel()).scatter_reduce(0, instance, count - answer.long(), "amin")
    prompt = (count == begin[instance]) & real
    length = torch.zeros_like(count).scatter_add(0, instance, prompt.long())
    return torch.where((length > 1)[instance], prompt, real).view(B, L)


def instance_of_token(B: int, L: int, starts: Tensor | None, device: torch.device) -> Tensor:
    """The number of each token's instance, [B * L] int64: of its row, or of the packed instance that it belongs to."""
    if starts is None:
        return torch.arange(B, device=device).repeat_interleave(L)
    return starts.flatten().cumsum(0) - 1


def start_mask(labels: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens of a decoder behind an encoder up to its first prediction, [B, L] bool, from labels [B, L]. These
    labels are shifted: each is the next token."""
    answer = (labels != IGNORED).long()
    start = answer.cumsum(1) - answer == 0
    return start if mask is None else start & mask


def cumulative_lengths(starts: Tensor) -> Tensor:
    """[B, L] bool to [S + 1] int64."""
    flat = starts.reshape(-1)
    return torch.cat((flat.nonzero().flatten(), flat.new_full((1,), flat.numel(), dtype=torch.int64)))


def _of_full_attention(mask: Any) -> Any:
    """Return the mask of full attention if ``mask`` is a dictionary by kind of attention layer, else ``mask``."""
    if isinstance(mask, Mapping):
        return mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
    return mask


def _may_look() -> bool:
    """Whether values may be read: not under torch.compile or CUDA graph capture. On a GPU the host then waits for the
    device, once for each forward of training or prefill with positions. Without this look, contradictory arguments
    would silently route instances wrongly."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or capturing)


def _text_positions(position_ids: Tensor | None, B: int, L: int) -> Tensor | None:
    if position_ids is None or (position_ids.dim() == 3 and position_ids.shape[0] != 4):
        return None
    positions = position_ids[0] if position_ids.dim() == 3 else position_ids
    if positions.shape[-1] != L or positions.shape[0] not in (1, B) or positions.dim() != 2:
        return None  # they are not one position for each token
    return positions.expand(B, L)


def _changes(inner: Tensor) -> Tensor:
    """Add the first token of each row, where a segment always begins: [B, L - 1] to [B, L] bool."""
    return torch.cat((inner.new_ones(inner.shape[0], 1), inner), dim=1)


def _starts_of(cu_seq_lens: Tensor, B: int, L: int) -> Tensor:
    if cu_seq_lens.dim() != 1 or cu_seq_lens.numel() < 2:
        raise ValueError(f"cu_seq_lens_q must have the shape [segments + 1], got {tuple(cu_seq_lens.shape)}")
    if _may_look():
        edges = cu_seq_lens.tolist()
        if edges[0] != 0 or edges[-1] != B * L or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the {B * L} tokens, got {edges}")
        if not set(range(0, B * L, L)) <= set(edges):
            raise ValueError(f"cu_seq_lens_q has an instance that spans two of the {B} rows, got {edges}")
    starts = torch.zeros(B * L, dtype=torch.bool, device=cu_seq_lens.device)
    return starts.index_fill_(0, cu_seq_lens[:-1].long(), True).view(B, L)


def _restarts_within(positions: Tensor, mask: Tensor) -> bool:
    back_to_zero = (positions[:, 1:] == 0) & mask[:, 1:] & mask[:, :-1]
    return bool(back_to_zero.any())
