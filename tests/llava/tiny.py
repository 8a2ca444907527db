"""Models and files small enough for tests; every class is transformers' own."""

import types
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from mixlora_llava.model.small import make_llava

WIDTH, HIDDEN, LAYERS = 16, 24, 2


def tiny_llava(seed: int = 0, **settings) -> LlavaForConditionalGeneration:
    vision = {
        "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4, "projection_dim": 12,
    }  # fmt: skip
    text = {
        "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    settings = {"projector_hidden_act": "linear", "image_token_id": 3} | settings
    return make_llava(text, vision, seed=seed, **settings).eval()


def linear_sizes(layer: int) -> dict[str, tuple[int, int]]:
    """[d_out, d_in] of the linear layers of one decoder layer, by name in the released layout."""
    attention = {f"self_attn.{x}_proj": (WIDTH, WIDTH) for x in "qkvo"}
    mlp = {"mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN)}
    return {f"base_model.model.model.layers.{layer}.{name}.": size for name, size in (attention | mlp).items()}


def released_checkpoint(folder: Path, kind: str = "input_lora_a_param", E: int = 12, r: int = 3, shards: int = 1):
    """Write a synthetic checkpoint in the released layout; returns its tensors by key."""
    torch.manual_seed(1)
    state = {}
    for layer in range(LAYERS):
        for name, (d_out, d_in) in linear_sizes(layer).items():
            state[name + "weight"] = torch.randn(d_out, d_in)
            for e in range(E):
                state[f"{name}lora_A.default.{e}"] = torch.randn(1, d_in)
                state[f"{name}lora_B.default.{e}"] = torch.randn(1, d_out)
            extra = "cmoa_loarB_extra_selector." if kind.endswith("param") else "cmoa_selector."
            d_route = 4096 if kind == "task_embed" else d_in
            if kind != "random":
                state[name + "cmoa_selector.loraA_selector.weight"] = torch.randn(E, d_route) * (d_in / d_route) ** 0.5
                state[f"{name}{extra}loraB_selector.weight"] = torch.randn(E, d_route) * (d_in / d_route) ** 0.5
            if kind.endswith("param"):
                state[f"{name}{extra}loraA_param2loraB_selector.weight"] = torch.randn(E, r * d_in)
    state["base_model.model.lm_head.weight"] = torch.randn(48, WIDTH)
    state["base_model.model.model.mm_projector.weight"] = torch.randn(WIDTH, 12)
    state["base_model.model.model.mm_projector.bias"] = torch.randn(WIDTH)
    state["base_model.model.model.vision_tower.vision_tower.vision_model.post_layernorm.weight"] = torch.randn(12)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, state, shards)
    arguments = types.SimpleNamespace(n_experts=E, n_selected=r, lora_alpha=2 * E, lora_dropout=0.05, cond_type=kind)
    torch.save(arguments, folder / "cmoa_args.bin")
    return state


def write_shards(folder: Path, state: dict, shards: int) -> None:
    import json

    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    place = {key: names[i % shards] for i, key in enumerate(state)}  # a layer's tensors lie in several shards
    for name in names:
        torch.save({key: value for key, value in state.items() if place[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
