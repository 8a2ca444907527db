"""Find which tokens of a prompt are text, and which stand for images or other media, for ``pool="text"``."""

from typing import Any

import torch
from torch import Tensor

from .tokens import instance_of_token

# transformers' names, in a model's configuration, of the ids of the tokens that stand for media
IDS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
WITHOUT_IDS = "pool='text' needs input_ids, to tell text from images, and the model got none. Set pool='prompt'"


def media_ids(config: Any) -> tuple[int, ...] | str:
    """The ids of the tokens that stand for media, from a transformers model's configuration. If the model has a tower
    for media, and its configuration no id under a known name: a sentence that says so."""
    ids = tuple(sorted({id for name in IDS if isinstance(id := getattr(config, name, None), int)}))
    towers = [name for name in ("vision_config", "audio_config") if getattr(config, name, None) is not None]
    if towers and not ids:
        return (
            f"pool='text' does not know which tokens stand for media: {type(config).__name__} has {towers[0]}, and "
            f"none of {', '.join(IDS)}. Set pool='prompt'"
        )
    return ids


def find_media(ids: tuple[int, ...] | str, input_ids: Tensor | None) -> Tensor | str | None:
    """The tokens that stand for media, [B, L] bool; None if there are none; or a sentence that says why it is not known
    which they are.

    Args:
        ids: the result of ``media_ids``.
        input_ids: [B, L], if the model got them.
    """
    if isinstance(ids, str):
        return ids
    if not ids:
        return None
    return WITHOUT_IDS if input_ids is None else torch.isin(input_ids, torch.tensor(ids, device=input_ids.device))


def text_of_prompt(
    media: Tensor | str | None, prompt: Tensor | None, starts: Tensor | None, shape: tuple[int, int]
) -> Tensor | None:
    """Those tokens of each instance's prompt that are text, [B, L] bool. If an instance has none: its whole prompt.

    Args:
        media: the result of ``find_media``.
        prompt: [B, L] bool; None: all tokens.
        starts: the first tokens of packed instances, [B, L] bool; None: every row is one instance.
        shape: (B, L).

    Raises:
        ValueError: it is not known which tokens stand for media.
    """
    if media is None:
        return prompt
    if isinstance(media, str):
        raise ValueError(media)
    if tuple(media.shape) != shape:
        raise ValueError(
            f"pool='text' needs a token of input_ids for each of the decoder's, {shape}, got {tuple(media.shape)}: let "
            "the processor insert a token for each part of an image, or set pool='prompt'"
        )
    prompt = torch.ones_like(media) if prompt is None else prompt
    media = media.to(prompt.device)
    text, instance = prompt & ~media, instance_of_token(*shape, starts, prompt.device)
    length = torch.zeros_like(instance).scatter_add(0, instance, text.flatten().long())
    return torch.where((length > 0)[instance].view(shape), text, prompt)
