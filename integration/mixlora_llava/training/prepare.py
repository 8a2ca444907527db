"""Prepare the patched model and the data for a training, from its settings."""

import torch

from ..data.dataset import Conversations, Encoder
from ..model.patch import Patched, patch_llava
from .settings import Settings


def patch(model, settings: Settings, low_memory: bool = False) -> Patched:
    config = settings.adapter(task_dim=model.config.get_text_config().hidden_size)
    if low_memory:
        with torch.device("meta"):
            return patch_llava(model, config, train_projector=settings.train_projector)
    return patch_llava(model, config, train_projector=settings.train_projector)


def read_data(settings: Settings, processor) -> Conversations:
    encoder = Encoder(processor, settings.template, settings.max_length)
    decode = settings.check_images == "decode"
    return Conversations.read(
        settings.data, settings.images, encoder, strict=settings.strict, decode=decode, limit=settings.limit
    )
