"""MixLoRAModelLoader: load a model as vLLM does, and attach an adapter to it."""

import re
from dataclasses import replace
from typing import Any

import vllm
from torch import nn
from vllm.config import ModelConfig, VllmConfig, get_layers_from_vllm_config
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ..peft.media import media_ids
from . import refusals
from .batch import Batch
from .layer import AdaptedMethod, ServedLayer
from .op import NAME
from .placement import group_of, place
from .runner import ATTRIBUTE, follow_first_runner, follow_second_runner
from .saved import SavedAdapter, read_adapter, read_config
from .scheduler import check_hook
from .trained import trained_model, weights_of

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, to use its handlers
LAYER = re.compile(r".*\.\d+(?=\.)")


class MixLoRAModelLoader(BaseModelLoader):
    """``load_format="mixlora"``.

    ``model_loader_extra_config`` must have ``"adapter"``, the folder that ``save_pretrained`` wrote. It may have
    ``"load_format"``, the load format of the frozen model (default ``"auto"``), and ``"backend"``, ``"torch"`` or
    ``"triton"``, for the adapter's update (default: ``"triton"`` on a GPU). Other entries are passed to the loader of
    the frozen model.

    Raises:
        ValueError: the configuration cannot be served exactly. The message lists all reasons, with the flags to change.
    """

    def __init__(self, load_config: LoadConfig):
        super().__init__(load_config)
        extra = dict(load_config.model_loader_extra_config or {})
        self.folder = check_folder(extra.pop("adapter", None))
        load_format, self.backend = extra.pop("load_format", "auto"), check_backend(extra.pop("backend", None))
        self.base = get_model_loader(replace(load_config, load_format=load_format, model_loader_extra_config=extra))
        self.adapter: SavedAdapter | None = None

    def download_model(self, model_config: ModelConfig) -> None:
        self.base.download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        self.base.load_weights(model, model_config)
        if self.adapter is not None and self.adapter.trained:
            served: Any = model
            served.load_weights(iter(self.adapter.trained.items()))

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        # The version comes first: the other checks read the configuration, whose fields depend on it.
        refusals.refuse(refusals.of_version(vllm.__version__))
        config = read_config(self.folder)
        refusals.refuse(
            refusals.of_adapter(config),
            refusals.of_scheduler(vllm_config),
            refusals.of_model(vllm_config),
            refusals.of_architecture(model_config.hf_config),
            refusals.of_parallelism(vllm_config),
            refusals.of_images(vllm_config),
            refusals.of_text(config, vllm_config),
        )
        trained = trained_model(model_config.hf_config, model_config.dtype)
        expected = weights_of(trained, config)
        full = [name for name, weight in expected.items() if not weight.own]
        refusals.refuse(refusals.of_tied(full, trained.all_tied_weights_keys))
        self.adapter = read_adapter(self.folder, config, expected)
        model = super().load_model(vllm_config, model_config, prefix)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
        specs = {name: spec for name, layer in layers.items() if (spec := layer.get_kv_cache_spec(vllm_config))}
        refusals.refuse(refusals.of_attention(specs))
        attach(model, self.adapter, vllm_config, {layer_of(name) for name in specs}, self.backend)
        return model


def layer_of(attention: str) -> str:
    """The path of the decoder layer that contains an attention layer, such as ``model.layers.3``.

    Raises:
        ValueError: the name contains no number.
    """
    found = LAYER.match(attention)
    if found is None:
        raise ValueError(f"MixLoRA is served on decoders of numbered layers, got one with the attention {attention!r}")
    return found.group()


def check_folder(folder: Any) -> str:
    if not isinstance(folder, str):
        several = ": a server serves one adapter, start a server for each" if isinstance(folder, list) else ""
        raise ValueError(
            'load_format="mixlora" needs model_loader_extra_config={"adapter": FOLDER}, the folder of one adapter, '
            f"got {folder!r}{several}"
        )
    return folder


def check_backend(backend: Any) -> str | None:
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend must be 'torch', 'triton' or left out, got {backend!r}")
    return backend


def attach(
    model: nn.Module, adapter: SavedAdapter, vllm_config: VllmConfig, decoder_layers: set[str], backend: str | None
) -> None:
    """Add an adapter's parameters to the layers of a loaded model, and hook the model runner.

    Raises:
        ValueError: the adapter is for another model.
    """
    check_hook()
    placed = place(model, adapter.layers, decoder_layers)
    compilation = vllm_config.compilation_config
    device = vllm_config.device_config.device
    media = media_ids(vllm_config.model_config.hf_config) if adapter.config.pool == "text" else ()
    assert not isinstance(media, str)  # of_text has refused it
    batch = Batch(vllm_config.scheduler_config.max_num_batched_tokens, device, media)
    for name, members in placed.items():
        module: Any = model.get_submodule(name)
        layer = ServedLayer(
            members, [adapter.layers[member.path] for member in members], adapter.config, batch,
            dtype=module.params_dtype, device=device, group=group_of(module), backend=backend,
        )  # fmt: skip
        module.add_module("mixlora", layer)
        key = f"{name}.mixlora"
        compilation.static_forward_context[key] = layer
        module.quant_method = AdaptedMethod(module.quant_method, key)
    if compilation.splitting_ops is not None and NAME not in compilation.splitting_ops:
        compilation.splitting_ops.append(NAME)
    setattr(model, ATTRIBUTE, batch)
    if vllm_config.use_v2_model_runner:
        follow_second_runner(model, vllm_config)
    else:
        follow_first_runner()
    logger.info("MixLoRA adapter %s on %d of the model's fused layers", adapter.folder, len(placed))
