"""Convert released MixLoRA checkpoints to this package's adapters, and back.

The released files hold the whole model. The adapter gets the pools of factors, the routers, and the projector, which
was trained with them. Everything else is frozen; the report lists its keys.
"""

import re
import types
from collections import defaultdict
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor

from mixlora_kernels.peft import ConditionalMixLoRAConfig

from ..refusal import Missing, Refusal
from .layouts import (
    ARGUMENTS,
    LAYOUTS,
    RELEASED_FACTOR,
    RELEASED_LAYER,
    RELEASED_PROJECTOR,
    ROUTERS,
    TASK_DIM,
    WEIGHTS,
)  # fmt: skip
from .reading import load, stream


def to_adapter(released: str | Path, folder: str | Path, layout: str = "transformers") -> dict:
    """Write the adapter of a released checkpoint.

    Args:
        released: the checkpoint's folder, which contains ``cmoa_args.bin``.
        folder: the folder for ``adapter_config.json`` and ``adapter_model.safetensors``.
        layout: the kind of model that the adapter is for, ``"transformers"`` or ``"original"``. The released projector
            is one linear map; for transformers' LLaVA, which has two, see ``model.load.linear_projector``.

    Returns:
        The report: ``layers``, the number of adapted linear layers; ``parameters``; ``config``; and ``unused``, all
        keys that are not part of the adapter.

    Raises:
        ValueError: the checkpoint has a setting that the published MixLoRA does not have, lacks a factor or a router,
            or has a shape that does not fit its settings.
        FileNotFoundError: see ``reading``.
    """
    layers_path, projector_path = LAYOUTS[layout]
    config = read_arguments(load(Path(released, ARGUMENTS)))
    found: dict[str, dict] = defaultdict(lambda: {"A": {}, "B": {}})
    weights, unused = {}, []
    for key, tensor in stream(released):
        match = RELEASED_LAYER.fullmatch(key)
        part = match[3] if match else ""
        if key.startswith(RELEASED_PROJECTOR):
            weights[f"base_model.model.{projector_path}.{key.removeprefix(RELEASED_PROJECTOR)}"] = tensor.clone()
        elif factor := RELEASED_FACTOR.fullmatch(part):
            found[f"{layers_path}.{match[1]}.{match[2]}"][factor[1]][int(factor[2])] = tensor
        elif part in ROUTERS:
            found[f"{layers_path}.{match[1]}.{match[2]}"][ROUTERS[part]] = tensor
        else:
            unused.append(key)
    if not found:
        raise Refusal(f"{released} has no MixLoRA layer: no key like {RELEASED_LAYER.pattern}")
    if config.routing == "task":
        config.task_dim = next(iter(found.values()))["router_A"].shape[1]
    parts = {name.split(".layers.")[1].split(".", 1)[1] for name in found}
    config.target_modules = rf"{re.escape(layers_path)}\.\d+\.({'|'.join(map(re.escape, sorted(parts)))})"
    config.modules_to_save = [projector_path] if any(projector_path in key for key in weights) else None
    for name, parameters in found.items():
        for parameter, tensor in assemble(name, parameters, config).items():
            weights[f"base_model.model.{name}.mixlora_adapter.{parameter}"] = tensor
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(folder)
    return {
        "layers": len(found),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "config": {name: getattr(config, name) for name in ("r", "num_factors", "alpha", "routing", "conditioning")},
        "unused": unused,
    }


def read_arguments(arguments: types.SimpleNamespace) -> ConditionalMixLoRAConfig:
    """The configuration that a released checkpoint was trained with.

    Raises:
        ValueError: the paper's method does not have one of the settings. The message names it.
    """
    kind = arguments.cond_type
    refused = {
        "cond_type": kind not in ("input", "input_lora_a_param", "task_embed", "random"),
        "independent_rank": not getattr(arguments, "independent_rank", True),
        "mix_loraA": not getattr(arguments, "mix_loraA", True),
        "mix_start_layer": getattr(arguments, "mix_start_layer", 0) != 0,
        "mix_mm_projector": getattr(arguments, "mix_mm_projector", False),
        "used_scored_weight": getattr(arguments, "used_scored_weight", False),
        "ifs_weight": getattr(arguments, "ifs_weight", 1) != 1,
    }
    if wrong := {name: getattr(arguments, name) for name, refuse in refused.items() if refuse}:
        raise Refusal(f"{ARGUMENTS} has settings that MixLoRA as published does not have: {wrong}")
    routing = {"task_embed": "task", "random": "random"}.get(kind, "instance")
    return ConditionalMixLoRAConfig.published(
        r=arguments.n_selected,
        num_factors=arguments.n_experts,
        alpha=arguments.lora_alpha,
        dropout=getattr(arguments, "lora_dropout", 0.0),
        routing=routing,
        conditioning="published" if kind == "input_lora_a_param" else "none",
        task_dim=TASK_DIM if routing == "task" else None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def assemble(name: str, found: dict, config: ConditionalMixLoRAConfig) -> dict[str, Tensor]:
    """Convert one layer's released parameters to this package's layout.

    Args:
        found: ``A`` and ``B``, the factors [1, d] by number, and the routers; ``router_AB`` is [E, r * d_in].

    Raises:
        ValueError: a parameter is missing or unknown, or has a wrong shape.
    """
    E, r = config.num_factors, config.r
    for pool in "AB":
        if sorted(found[pool]) != list(range(E)):
            raise Refusal(f"{name} needs the factors 0 to {E - 1} of lora_{pool}, got {sorted(found[pool])}")
    pools = {f"lora_{pool}": torch.cat([found[pool][e] for e in range(E)]) for pool in "AB"}
    d_in = pools["lora_A"].shape[1]
    d_route = config.task_dim or d_in
    expected = {}
    if config.has_routers:
        expected |= {"router_A": (E, d_route), "router_B": (E, d_route)}
    if config.has_conditioning:
        expected["router_AB"] = (E, r * d_in)
    routers = {key: tensor for key, tensor in found.items() if key.startswith("router")}
    got = {key: tuple(tensor.shape) for key, tensor in routers.items()}
    if got != expected:
        raise Refusal(f"{name} needs routers of the shapes {expected}, got {got}")
    if "router_AB" in routers:
        routers["router_AB"] = routers["router_AB"].view(E, r, d_in).transpose(0, 1)
    return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in (pools | routers).items()}


def to_released(adapter: str | Path, folder: str | Path, base: str | Path | None = None) -> dict:
    """Write an adapter in the released layout: ``pytorch_model.bin`` and ``cmoa_args.bin``.

    Args:
        adapter: the adapter's folder.
        base: a released checkpoint, from which the tensors of the frozen model are copied. Without it the file holds
            only the adapter and the projector, and ``load_state_dict`` needs ``strict=False``.

    Returns:
        The report: ``layers``, and ``copied``, the number of tensors from ``base``.

    Raises:
        ValueError: the folder has no MixLoRA adapter, or the adapter computes something that the released code does
            not. The message names its setting or its tensors.
        FileNotFoundError: the adapter has no weights, or see ``reading``.
    """
    config = read_config(adapter)
    kind = released_kind(config)
    state, foreign, layers = {}, [], set()
    pattern = re.compile(r"base_model\.model\.(.+?)\.mixlora_adapter\.(\w+)")
    projector = {f"base_model.model.{path}.{name}": name for _, path in LAYOUTS.values() for name in ("weight", "bias")}
    if not Path(adapter, WEIGHTS).is_file():
        raise Missing(f"missing: {Path(adapter, WEIGHTS)}, the weights of the adapter")
    for key, tensor in stream(Path(adapter, WEIGHTS)):
        match = pattern.fullmatch(key)
        if match and ".layers." in match[1]:
            layers.add(match[1])
            name = f"base_model.model.model.layers.{match[1].split('.layers.')[1]}."
            state |= disassemble(name, match[2], tensor, config)
        elif key in projector:
            state[RELEASED_PROJECTOR + projector[key]] = tensor
        else:
            foreign.append(key.removeprefix("base_model.model."))
    if foreign:
        raise Refusal(
            f"{adapter} holds trained tensors that the released code has no place for ({', '.join(foreign)}): it has "
            "MixLoRA layers in the decoder, and one linear map as the projector; train without other modules, and the "
            "projector only of a LLaVA with projector_hidden_act='linear'"
        )
    copied = {} if base is None else {key: t for key, t in stream(base) if key not in state}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(copied | state, folder / "pytorch_model.bin")
    arguments = types.SimpleNamespace(
        n_experts=config.num_factors, n_selected=config.r, lora_alpha=config.scaling * config.r,
        lora_dropout=config.dropout, lora_bias="none", cond_type=kind, attribute_dim=32, independent_rank=True,
        mix_loraA=True, mix_start_layer=0, mix_mm_projector=False, used_scored_weight=False, ifs_weight=1,
    )  # fmt: skip
    torch.save(arguments, folder / ARGUMENTS)
    return {"layers": len(layers), "copied": len(copied)}


def read_config(adapter: str | Path) -> ConditionalMixLoRAConfig:
    """The configuration of a MixLoRA adapter.

    Raises:
        ValueError: the folder has no adapter, or one of another method.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
    except (ValueError, TypeError, OSError) as error:
        raise Refusal(f"{adapter} holds no adapter: {str(error)[:500]}") from error
    if not isinstance(config, ConditionalMixLoRAConfig):
        raise Refusal(f"{adapter} holds no MixLoRA adapter, its type is {config.peft_type}")
    return config


def released_kind(config: ConditionalMixLoRAConfig) -> str:
    """The released code's ``cond_type`` of an adapter.

    Raises:
        ValueError: the released code does not compute what the adapter computes. The message names the settings.
    """
    kinds = {
        ("instance", "published"): "input_lora_a_param",
        ("instance", "none"): "input",
        ("task", "none"): "task_embed",
    }
    kind = "random" if config.routing == "random" else kinds.get((config.routing, config.conditioning))
    # A task's embedding has no padding, and is the same in each decoding step. Random routing reads no tokens.
    fixed = {"instance": ("gate", "pool", "decode"), "random": ("gate", "decode"), "task": ("gate",)}[config.routing]
    published = ConditionalMixLoRAConfig.published()
    if kind is None or any(getattr(config, name) != getattr(published, name) for name in fixed):
        got = ", ".join(f"{name}={getattr(config, name)!r}" for name in ("routing", "conditioning", *fixed))
        raise Refusal(
            f"the released code has no counterpart of this adapter's {got}: train with the settings of "
            "ConditionalMixLoRAConfig.published()"
        )
    return kind


def disassemble(name: str, parameter: str, tensor: Tensor, config: ConditionalMixLoRAConfig) -> dict[str, Tensor]:
    """The released keys and tensors of one parameter of a layer. ``name`` ends with a dot."""
    if parameter.startswith("lora"):
        return {f"{name}{parameter}.default.{e}": row.clone() for e, row in enumerate(tensor.split(1))}
    conditional = config.has_conditioning
    names = {released: ours for released, ours in ROUTERS.items() if ours == parameter}
    # With the conditional router, B's own router sits beside it.
    released = next(key for key in names if parameter == "router_A" or ("extra" in key) == conditional)
    if parameter == "router_AB":
        tensor = tensor.transpose(0, 1).flatten(1)  # [E, r * d_in]
    return {name + released: tensor.contiguous()}
