"""What cannot be served exactly is refused by name, with the flag that mends it, before a weight is loaded.

The page serving.md shows every message; a message that is not there fails the test.
"""

import re

import pytest

from .conftest import needs_vllm
from .loading import DOCUMENTED, load

pytestmark = [*needs_vllm, pytest.mark.usefixtures("offline")]

#: By what is asked for: arguments of vLLM, and the message.
CONFIGURATIONS = {
    "chunked prefill": (
        {"enable_chunked_prefill": True},
        "chunked prefill is on, which computes a prompt in pieces; it is routed as a whole. "
        "Add --no-enable-chunked-prefill (enable_chunked_prefill=False)",
    ),
    "long prefill threshold": (
        {"long_prefill_token_threshold": 8},
        "long_prefill_token_threshold=8 cuts longer prompts into pieces. Leave out --long-prefill-token-threshold",
    ),
    "prefix caching": (
        {"enable_prefix_caching": True},
        "prefix caching is on, which leaves out of a prompt's computation what another prompt began with; the mean "
        "that routes it runs over all its tokens. Add --no-enable-prefix-caching (enable_prefix_caching=False)",
    ),
    "speculative decoding": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "speculative decoding is on, which is not tested with an adapter of this kind. Leave out --speculative-config",
    ),
    "KV connector": (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "a KV connector brings in prompts that were computed elsewhere, and the routing does not come with them. "
        "Leave out --kv-transfer-config",
    ),
    "encoder cache connector": (
        {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}},
        "an encoder cache connector brings in images that were computed elsewhere, which is not tested. "
        "Leave out --ec-transfer-config",
    ),
    "vLLM's LoRA": (
        {"enable_lora": True},
        "vLLM's LoRA is on; a server serves one adapter, the one in model_loader_extra_config. "
        "Leave out --enable-lora and --lora-modules",
    ),
    "data parallelism": (
        {"data_parallel_size": 2},
        "data_parallel_size=2 is not tested. Set --data-parallel-size 1; several servers behind a balancer take its "
        "place",
    ),
    "pipeline parallelism": (
        {"pipeline_parallel_size": 2},
        "pipeline_parallel_size=2 is not tested. Set --pipeline-parallel-size 1",
    ),
    "prompts as embeddings": (
        {"enable_prompt_embeds": True},
        "prompts given as embeddings are not tested. Leave out --enable-prompt-embeds",
    ),
    "pooling": (
        {"runner": "pooling"},
        "runner='pooling' does not generate, which is not tested. Add --runner generate",
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration(saved, name):
    options, message = CONFIGURATIONS[name]
    with pytest.raises(ValueError, match=re.escape(f"- {message}")):
        load(saved, **options)
    assert message in DOCUMENTED


def test_all_of_them_are_listed_at_once(saved):
    with pytest.raises(ValueError, match="cannot serve with this configuration") as caught:
        load(saved, enable_chunked_prefill=True, enable_prefix_caching=True)
    assert str(caught.value).count("\n- ") == 2


def test_the_configuration_of_the_exact_tests_is_not_refused(saved):
    """The control: what follows the refusals is reached, and fails for want of vLLM's process groups."""
    with pytest.raises(AssertionError, match="group is not initialized"):
        load(saved)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda config: setattr(config.scheduler_config, "max_num_batched_tokens", 128),
            "max_num_batched_tokens=128 is less than max_model_len=256, so that a long prompt cannot be computed in "
            "one step. Set --max-num-batched-tokens 256 or more, or a smaller --max-model-len",
        ),
        (
            lambda config: setattr(config.parallel_config, "decode_context_parallel_size", 2),
            "decode_context_parallel_size=2 is not tested. Set --decode-context-parallel-size 1",
        ),
        (
            lambda config: setattr(config.parallel_config, "prefill_context_parallel_size", 2),
            "prefill_context_parallel_size=2 is not tested. Set --prefill-context-parallel-size 1",
        ),
        (
            lambda config: setattr(config.parallel_config, "enable_dbo", True),
            "dual batch overlap cuts a step in two, and prompts with it. Leave out --enable-dbo",
        ),
        (
            lambda config: setattr(config.model_config.hf_config, "architectures", ["Own"]),
            "architecture 'Own' is not a class of the installed transformers, whose model tells which weights an "
            "adapter has to bring. Serve a model of transformers' own code",
        ),
        (
            lambda config: record_whole_steps(config),
            "cudagraph_mode=FULL records whole steps; an adapter's operation has to run outside of graphs. "
            'Add --enforce-eager, or --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\' (tested on CPUs only)',
        ),
    ],
    ids=[
        "batched tokens",
        "decode context parallel",
        "prefill context parallel",
        "dual batch overlap",
        "code of its own",
        "full graphs",
    ],
)
def test_a_configuration_that_vllm_makes_elsewhere(saved, change, message):
    """These vLLM refuses itself on a CPU, or only for some models: they are set afterwards."""
    with pytest.raises(ValueError, match=re.escape(f"- {message}")):
        load(saved, change)
    assert message in DOCUMENTED


@pytest.mark.parametrize("known", [True, False])
def test_routing_by_text(known):
    """Of a model whose images' tokens are known in the second model runner; and of one where they are not."""
    from types import SimpleNamespace

    from transformers import LlavaConfig as Known

    from mixlora_kernels.peft import ConditionalMixLoRAConfig
    from mixlora_kernels.serving.refusals import of_text, refuse

    class LlavaConfig:
        vision_config = object()

    model = SimpleNamespace(hf_config=Known() if known else LlavaConfig())
    config = SimpleNamespace(model_config=model, use_v2_model_runner=True)
    message = (
        "pool='text' with images: vLLM's second model runner keeps the prompts' tokens on the device. "
        "Set VLLM_USE_V2_MODEL_RUNNER=0, or train with pool='prompt'"
        if known
        else "pool='text': LlavaConfig does not name the tokens that stand for images. Train with pool='prompt'"
    )
    with pytest.raises(ValueError, match=re.escape(f"- {message}")):
        refuse(of_text(ConditionalMixLoRAConfig(pool="text"), config))
    assert message in DOCUMENTED
    assert not list(of_text(ConditionalMixLoRAConfig(pool="prompt"), config))
    config.use_v2_model_runner = False
    assert len(list(of_text(ConditionalMixLoRAConfig(pool="text"), config))) == (not known)


def record_whole_steps(config) -> None:
    from vllm.config import CUDAGraphMode

    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    config.model_config.enforce_eager = False


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "0.1.dev1+g3f2a", "unknown"])
def test_other_versions_of_vllm(saved, monkeypatch, version):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    message = (
        f"vLLM {version} is not among the versions tested, 0.32. "
        "Install one of these: pip install 'mixlora_kernels[vllm]'"
    )
    with pytest.raises(ValueError, match=re.escape(f"- {message}")):
        load(saved)
    assert message.replace(version, "0.33.0") in DOCUMENTED


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7", "0.32.1+cpu", "0.32.2.post1"])
def test_tested_versions_of_vllm(version):
    from mixlora_kernels.serving.versions import check_version

    assert check_version(version) is None
