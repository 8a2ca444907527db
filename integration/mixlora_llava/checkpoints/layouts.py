"""The names in released MixLoRA checkpoints, and the names of the same parts in a model."""

import re

ARGUMENTS, WEIGHTS = "cmoa_args.bin", "adapter_model.safetensors"
RELEASED_LAYER = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.((?:self_attn|mlp)\.\w+)\.(.+)")
RELEASED_FACTOR = re.compile(r"lora_([AB])\.default\.(\d+)")
RELEASED_PROJECTOR = "base_model.model.model.mm_projector."
ROUTERS = {
    "cmoa_selector.loraA_selector.weight": "router_A",
    "cmoa_selector.loraB_selector.weight": "router_B",
    "cmoa_loarB_extra_selector.loraB_selector.weight": "router_B",
    "cmoa_loarB_extra_selector.loraA_param2loraB_selector.weight": "router_AB",
}
TASK_DIM = 4096  # Vicuna-7B's width, which encodes the task definitions
# The names of the decoder's layers and of the projector, in transformers' LLaVA and in the original one.
LAYOUTS = {
    "transformers": ("model.language_model.layers", "model.multi_modal_projector.linear_1"),
    "original": ("model.layers", "model.mm_projector"),
}
