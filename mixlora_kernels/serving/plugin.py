"""register: the entry point that vLLM calls in each of its processes."""

LOAD_FORMAT = "mixlora"


def register() -> None:
    """Make ``load_format="mixlora"`` known to vLLM."""
    from vllm.model_executor.model_loader import register_model_loader

    from .loader import MixLoRAModelLoader

    register_model_loader(LOAD_FORMAT)(MixLoRAModelLoader)
