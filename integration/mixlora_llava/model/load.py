"""Load a LLaVA, whole or from its parts, and load adapters into it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import mixlora_kernels.peft  # noqa: F401  peft has to know the method before it reads an adapter

from ..checkpoints.reading import stream
from ..data.conversation import IMAGE
from ..data.text import shown
from ..refusal import Missing, Refusal

PROJECTOR = "mm_projector."
TASKS = "task_embeddings.safetensors"  # in the folder of an adapter that routes by task


def load_llava(source: str | Path | dict, dtype: torch.dtype | str = "auto"):
    """Load a LLaVA and its processor.

    Args:
        source: the folder or hub name of transformers' LLaVA or LLaVA-Next; or the parts of a LLaVA v1 before
            instruction tuning: ``{language: ..., vision: ..., projector: mm_projector.bin}``.
        dtype: of the parameters.

    Returns:
        The model in evaluation mode, and its processor, which pads on the right and knows how many tokens an image has.
    """
    processor = load_processor(source)
    if isinstance(source, dict):
        model = compose_llava(**source, tokenizer=processor.tokenizer, dtype=dtype)
    else:
        with reading("model", source):
            model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    return model.eval(), processor


def read_source(text: str) -> str | dict:
    """Parse ``load_llava``'s source from a command line: a name, or a LLaVA's parts as JSON.

    Raises:
        ValueError: the text begins with a brace, but is not valid JSON or has other parts.
    """
    if not text.startswith("{"):
        return text
    try:
        parts = json.loads(text)
    except json.JSONDecodeError as error:
        raise Refusal(f"a model's parts must be JSON, got {text}: {error}") from error
    if not {"language", "vision"} <= parts.keys() <= {"language", "vision", "projector"}:
        raise Refusal(f"a model's parts are language, vision and, if any, projector, got {', '.join(parts)}")
    return parts


@contextmanager
def reading(what: str, source: str | Path) -> Iterator[None]:
    """If transformers finds no model, raise an error whose one sentence says what to do.

    Raises:
        Missing: the folder does not exist, and neither the hub's cache nor the hub has the model.
        Refusal: the folder exists, and holds something else.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        why = shown(str(error).strip().partition("\n")[0], 200)
        if Path(source).exists():
            raise Refusal(f"{source} holds no {what} that transformers can read ({why})") from error
        raise Missing(
            f"missing: the {what} {source}, which is not a folder here, and the hub did not provide it ({why}); "
            f"fetch it where there is a connection with: hf download {source}, or give the folder of a copy"
        ) from error


def read_config(source: str | Path, what: str):
    """Read the configuration of a model, without its weights."""
    with reading(what, source):
        return AutoConfig.from_pretrained(source)


def load_processor(source: str | Path | dict):
    """Load the processor alone; see ``load_llava``."""
    if not isinstance(source, dict):
        with reading("model with its processor", source):
            processor = AutoProcessor.from_pretrained(source)
            config = AutoConfig.from_pretrained(source)
        vision, strategy = config.vision_config, config.vision_feature_select_strategy
    else:
        with reading("language model", source["language"]):
            tokenizer = AutoTokenizer.from_pretrained(source["language"], use_fast=True)
        tokenizer.add_tokens([IMAGE], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        with reading("vision tower", source["vision"]):
            images, vision = (kind.from_pretrained(source["vision"]) for kind in (AutoImageProcessor, AutoConfig))
        processor = LlavaProcessor(image_processor=images, tokenizer=tokenizer, image_token=IMAGE)
        vision, strategy = getattr(vision, "vision_config", vision), "default"
    # These fields tell how many tokens an image has. Some processors were saved without them. The 1 is CLIP's class
    # token, which the strategy "default" removes.
    processor.patch_size = processor.patch_size or vision.patch_size
    processor.vision_feature_select_strategy = processor.vision_feature_select_strategy or strategy
    processor.num_additional_image_tokens = processor.num_additional_image_tokens or 1
    processor.tokenizer.padding_side = "right"
    return processor


def empty_llava(source: str | Path | dict, dtype: torch.dtype | str = "auto"):
    """A LLaVA without weights, on the meta device, to count parameters and bytes; see ``load_llava``."""
    with torch.device("meta"):
        if isinstance(source, dict):
            text, vision = (read_config(source[part], f"{part} part") for part in ("language", "vision"))
            model = LlavaForConditionalGeneration(compose_config(text, vision))
        else:
            model = AutoModelForImageTextToText.from_config(read_config(source, "model"))
    if dtype == "auto":
        dtype = model.config.dtype or model.config.get_text_config().dtype or torch.float32
    return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def compose_llava(language: str, vision: str, projector: str | None = None, *, tokenizer, dtype="auto"):
    """Compose a LLaVA v1 before instruction tuning, from a language model, a CLIP and a linear projector.

    Args:
        language, vision: folders or hub names.
        projector: the file ``mm_projector.bin`` of stage one, one linear map; None: random weights.
        tokenizer: the language model's tokenizer, with ``<image>`` added.

    Raises:
        ValueError: the projector's file does not hold one linear map of the right size.
    """
    with reading("language model", language):
        text = AutoModelForCausalLM.from_pretrained(language, dtype=dtype)
    with reading("vision tower", vision):
        tower = AutoModel.from_pretrained(vision, dtype=text.dtype)
    tower = getattr(tower, "vision_model", tower)
    config = compose_config(text.config, tower.config, tokenizer.convert_tokens_to_ids(IMAGE), tokenizer.pad_token_id)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = text.model, text.lm_head
    model.model.vision_tower = tower
    model.model.multi_modal_projector.to_empty(device="cpu").to(text.dtype)
    linear_projector(model, None if projector is None else read_projector(projector))
    model.resize_token_embeddings(max(len(tokenizer), text.config.vocab_size), mean_resizing=False)
    model.generation_config = text.generation_config
    return model


def compose_config(text, vision, image_id: int = 32000, pad_id: int = 0) -> LlavaConfig:
    """The configuration of LLaVA v1. It uses the features of CLIP's last layer but one, without the class token, and
    one linear map as the projector."""
    return LlavaConfig(
        vision_config=getattr(vision, "vision_config", vision),
        text_config=text,
        image_token_id=image_id,
        pad_token_id=pad_id,
        projector_hidden_act="linear",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


@torch.no_grad()
def linear_projector(model: nn.Module, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Make transformers' projector, which has two maps and an activation, equal to the one linear map of LLaVA v1.

    ``linear_1`` becomes the map, and ``linear_2`` the identity. The activation must be ``"linear"``.

    Args:
        weights: ``weight`` [d_text, d_vision] and ``bias`` [d_text]; None: random weights.

    Raises:
        ValueError: the activation is another one, or the shapes do not fit.
    """
    if model.config.projector_hidden_act != "linear":
        raise Refusal(f"projector_hidden_act must be 'linear', got {model.config.projector_hidden_act!r}")
    projector = model.model.multi_modal_projector
    first, second = projector.linear_1, projector.linear_2
    nn.init.eye_(second.weight)
    nn.init.zeros_(second.bias)
    if weights is None:
        first.reset_parameters()
        return
    for name, parameter in first.named_parameters():
        if weights[name].shape != parameter.shape:
            raise Refusal(f"projector {name} must be {tuple(parameter.shape)}, got {tuple(weights[name].shape)}")
        parameter.copy_(weights[name])


def read_projector(file: str | Path) -> dict[str, torch.Tensor]:
    """Read ``weight`` and ``bias`` from a stage-one projector's file, with any prefix before these names.

    Raises:
        ValueError: the file does not hold one linear map.
    """
    found = {key.rpartition(PROJECTOR)[2]: tensor for key, tensor in stream(file) if PROJECTOR in key}
    if found.keys() != {"weight", "bias"}:
        raise Refusal(f"{file} must hold one linear map, {PROJECTOR}weight and {PROJECTOR}bias, got {sorted(found)}")
    return found


def load_adapter(model: nn.Module, folder: str | Path):
    """Load a trained adapter into a model, for inference. Also return its task embeddings by name, or None without task
    routing.

    Raises:
        ValueError: the adapter does not fit the model, or the folder has no adapter.
    """
    try:
        adapted = PeftModel.from_pretrained(model, folder).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise Refusal(f"{folder} holds no adapter of this model: {str(error)[:500]}") from error
    file = Path(folder, TASKS)
    return adapted, load_file(file) if file.is_file() else None
