"""Find what cannot be served exactly, before a weight is loaded. Each refusal names the flag to change.

A request must be routed once, in one step, by its whole prompt and nothing else. A setting that cuts prompts, or skips
tokens of a prompt, would silently give wrong answers.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from ..config import MixLoRAConfig
from ..peft.media import media_ids
from .versions import check_version


class Refusal(NamedTuple):
    """Something that cannot be served.

    Attributes:
        what: the setting, and why it cannot be served.
        mend: what to do instead, with the flag.
    """

    what: str
    mend: str


def refuse(*refusals: Iterable[Refusal]) -> None:
    """Raise a ValueError that lists all refusals; do nothing if there are none."""
    found = list(chain(*refusals))
    if found:
        listed = "\n".join(f"- {refusal.what}. {refusal.mend}" for refusal in found)
        raise ValueError(f"load_format='mixlora' cannot serve with this configuration:\n{listed}")


def of_version(version: str) -> Iterator[Refusal]:
    """Refuse a version of vLLM that was not tested."""
    problem = check_version(version)
    if problem is not None:
        yield Refusal(problem, "Install one of these: pip install 'mixlora_kernels[vllm]'")


def of_adapter(config: MixLoRAConfig) -> Iterator[Refusal]:
    """Refuse settings of an adapter's configuration."""
    if config.routing != "instance":
        yield Refusal(
            f"routing={config.routing!r}: a request brings its prompt, and nothing else that could be routed by",
            "Train with routing='instance'",
        )
    if config.decode != "prompt":
        yield Refusal(
            f"decode={config.decode!r} routes each generated token anew, a server keeps the prompt's routing",
            "Train with decode='prompt'",
        )


def of_scheduler(config: Any) -> Iterator[Refusal]:
    """Refuse settings of a VllmConfig that change how prompts are computed."""
    scheduler = config.scheduler_config
    if scheduler.enable_chunked_prefill:
        yield Refusal(
            "chunked prefill is on, which computes a prompt in pieces; it is routed as a whole",
            "Add --no-enable-chunked-prefill (enable_chunked_prefill=False)",
        )
    if scheduler.long_prefill_token_threshold:
        yield Refusal(
            f"long_prefill_token_threshold={scheduler.long_prefill_token_threshold} cuts longer prompts into pieces",
            "Leave out --long-prefill-token-threshold",
        )
    if scheduler.max_num_batched_tokens < config.model_config.max_model_len:
        yield Refusal(
            f"max_num_batched_tokens={scheduler.max_num_batched_tokens} is less than "
            f"max_model_len={config.model_config.max_model_len}, so that a long prompt cannot be computed in one step",
            f"Set --max-num-batched-tokens {config.model_config.max_model_len} or more, or a smaller --max-model-len",
        )
    if config.cache_config.enable_prefix_caching:
        yield Refusal(
            "prefix caching is on, which leaves out of a prompt's computation what another prompt began with; the mean "
            "that routes it runs over all its tokens",
            "Add --no-enable-prefix-caching (enable_prefix_caching=False)",
        )
    if config.speculative_config is not None:
        yield Refusal(
            "speculative decoding is on, which is not tested with an adapter of this kind",
            "Leave out --speculative-config",
        )
    if config.kv_transfer_config is not None:
        yield Refusal(
            "a KV connector brings in prompts that were computed elsewhere, and the routing does not come with them",
            "Leave out --kv-transfer-config",
        )
    if config.ec_transfer_config is not None:
        yield Refusal(
            "an encoder cache connector brings in images that were computed elsewhere, which is not tested",
            "Leave out --ec-transfer-config",
        )


def of_model(config: Any) -> Iterator[Refusal]:
    """Refuse settings of a VllmConfig for the model as a whole."""
    model = config.model_config
    if config.lora_config is not None:
        yield Refusal(
            "vLLM's LoRA is on; a server serves one adapter, the one in model_loader_extra_config",
            "Leave out --enable-lora and --lora-modules",
        )
    if model.runner_type != "generate":
        yield Refusal(f"runner={model.runner_type!r} does not generate, which is not tested", "Add --runner generate")
    if model.enable_prompt_embeds:
        yield Refusal("prompts given as embeddings are not tested", "Leave out --enable-prompt-embeds")
    graphs = config.compilation_config.cudagraph_mode
    if graphs is not None and graphs.has_full_cudagraphs() and not model.enforce_eager:
        yield Refusal(
            f"cudagraph_mode={graphs.name} records whole steps; an adapter's operation has to run outside of graphs",
            'Add --enforce-eager, or --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\' (tested on CPUs only)',
        )


def of_architecture(config: Any) -> Iterator[Refusal]:
    """Refuse a model, given by its Hugging Face configuration, whose layers' names in training are not known."""
    import transformers

    name = (config.architectures or [None])[0]
    if not hasattr(transformers, str(name)):
        yield Refusal(
            f"architecture {name!r} is not a class of the installed transformers, whose model tells which weights an "
            "adapter has to bring",
            "Serve a model of transformers' own code",
        )


def of_tied(trained: Iterable[str], tied: Mapping[str, str]) -> Iterator[Refusal]:
    """Refuse weights of ``modules_to_save`` that the frozen model shares between two modules. Training in full gives a
    module weights of its own and leaves the other as it was; vLLM would give both the trained ones.

    Args:
        trained: the names of the weights of ``modules_to_save``.
        tied: for each weight that is another's, the other's name (transformers' ``all_tied_weights_keys``).
    """
    both = {**tied, **{source: name for name, source in tied.items()}}
    for name in sorted(set(trained) & both.keys()):
        yield Refusal(
            f"modules_to_save trained {name}, which the model ties to {both[name]}; vLLM would use the trained weights "
            "for both",
            "Serve a copy of the model that is saved with tie_word_embeddings=False, so that each has weights of its "
            "own",
        )


def of_parallelism(config: Any) -> Iterator[Refusal]:
    """Refuse settings of a VllmConfig for several processes, except tensor parallelism."""
    parallel = config.parallel_config
    for name, more in (
        ("data_parallel_size", "; several servers behind a balancer take its place"),
        ("pipeline_parallel_size", ""),
        ("prefill_context_parallel_size", ""),
        ("decode_context_parallel_size", ""),
    ):
        if getattr(parallel, name) > 1:
            flag = name.replace("_", "-")
            yield Refusal(f"{name}={getattr(parallel, name)} is not tested", f"Set --{flag} 1{more}")
    if parallel.use_ubatching:
        yield Refusal("dual batch overlap cuts a step in two, and prompts with it", "Leave out --enable-dbo")


def of_images(config: Any) -> Iterator[Refusal]:
    """Refuse settings with which images can cut a prompt."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from .scheduler import WholePrompts

    scheduler, multimodal = config.scheduler_config, config.model_config.multimodal_config
    if multimodal is None or multimodal.language_model_only:
        return
    given = scheduler.scheduler_cls
    given = resolve_obj_by_qualname(given) if isinstance(given, str) else given
    if not (isinstance(given, type) and issubclass(given, WholePrompts)):
        name = "AsyncWholePromptScheduler" if scheduler.async_scheduling else "WholePromptScheduler"
        yield Refusal(
            "images can cut a prompt where vLLM's own scheduler has spent a step's budget for them",
            f"Add --scheduler-cls {WholePrompts.__module__}.{name}, by which such a prompt waits for the next step, or "
            "--language-model-only",
        )
    if scheduler.max_num_encoder_input_tokens < config.model_config.max_model_len:
        yield Refusal(
            f"max_num_encoder_input_tokens={scheduler.max_num_encoder_input_tokens} is less than max_model_len="
            f"{config.model_config.max_model_len}: a prompt of many images would wait for ever",
            f"Set --max-num-batched-tokens {config.model_config.max_model_len} or more",
        )


def of_text(adapter: MixLoRAConfig, config: Any) -> Iterator[Refusal]:
    """Refuse an adapter that is routed by the prompt's text, if the server cannot tell text from images."""
    model = config.model_config.hf_config
    ids = media_ids(model) if adapter.pool == "text" else ()
    if isinstance(ids, str):
        yield Refusal(
            f"pool='text': {type(model).__name__} does not name the tokens that stand for images",
            "Train with pool='prompt'",
        )
    elif ids and config.use_v2_model_runner:
        yield Refusal(
            "pool='text' with images: vLLM's second model runner keeps the prompts' tokens on the device",
            "Set VLLM_USE_V2_MODEL_RUNNER=0, or train with pool='prompt'",
        )


def of_attention(specs: Mapping[str, Any]) -> Iterator[Refusal]:
    """Refuse layers whose KV caches, given by the layers' names, have no full attention. A request's state is kept at
    its first KV block, which must belong to the request until it ends."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    others = {}
    for name, spec in specs.items():
        if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
            others[name] = type(spec).__name__
    if others:
        name, kind = next(iter(others.items()))
        yield Refusal(
            f"{len(others)} layers have no full attention ({name}: {kind}); a sliding window gives a request's first "
            "block away while it runs, and with it the routing",
            "Add --disable-sliding-window if the model is to be used within its window, or serve another model",
        )
