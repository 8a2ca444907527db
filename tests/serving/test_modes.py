"""A Llama with an adapter in the other ways that vLLM runs it: compiled, in piecewise graphs, by its second model
runner and with this package's Triton kernel, and divided over two processes. Tokens and log-probabilities are those of
Hugging Face's generate.

What vLLM runs on a GPU alone runs here as far as it can: piecewise graphs without CUDA graphs of the pieces, and the
second model runner with its Triton kernels in Triton's interpreter.
"""

import pytest

from .conftest import needs_vllm
from .test_llama import compare

pytestmark = needs_vllm

NEW = 8
# The first four, of 5, 60, 17 and 33 tokens, fill the 6 blocks of 32 tokens that requests can have (vLLM keeps one for
# itself): when the second needs a third block, another request is preempted. The fifth, of 90 tokens, comes later.
PROMPTS, BLOCKS = 5, 7
ADAPTERS = {"paper": {}, "tied": {"conditioning": "tied", "gate": "normalized"}}
#: Heads of keys and values: two processes have one each, or both the same one.
KV_HEADS = {"paper": 2, "tied": 1}
LAYERS = 2  # each takes seconds to compile


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """The folder with a model and an adapter of each name, the prompts, and what generate gives for them."""
    from .models import generate, make_prompts, save_adapter, save_llama

    folder = tmp_path_factory.mktemp("llamas")
    prompts, wanted = make_prompts()[:PROMPTS], {}
    for name, settings in ADAPTERS.items():
        model = save_llama(folder / f"{name}-model", num_key_value_heads=KV_HEADS[name], num_hidden_layers=LAYERS)
        adapted = save_adapter(model, folder / name, **settings)
        wanted[name] = [generate(adapted, prompt, NEW) for prompt in prompts]
    return folder, prompts, wanted


def job(llamas, adapter: str, engine: dict | None = None, backend: str | None = None, few=slice(None), **more) -> dict:
    folder, prompts, _ = llamas
    options = {
        "model": str(folder / f"{adapter}-model"),
        "model_loader_extra_config": {"adapter": str(folder / adapter), "backend": backend},
        "max_num_seqs": 4,
        "num_gpu_blocks_override": BLOCKS,
        "max_model_len": 128,
    }
    return {
        "engine": options | (engine or {}),
        "prompts": [{"prompt_token_ids": prompt} for prompt in prompts[few]],
        "new": NEW,
        **more,
    }


@pytest.fixture(scope="module")
def compiled(llamas, engines):
    jobs = {
        "compiled": job(llamas, "paper", {"enforce_eager": False}),
        "piecewise": job(llamas, "tied", piecewise=True),
    }
    return engines.run(jobs)


def test_compiled(llamas, compiled):
    result = compiled["compiled"]
    compare(result, llamas[2]["paper"])
    assert result["preemptions"] > 0
    assert result["compiled"]["num_models_seen"] == 1


def is_cut_at_each_layer(counts: dict[str, int]) -> bool:
    """Whether the graph was cut at every operation of an adapter, four in a layer, and at the layer's attention."""
    cuts = 5 * LAYERS
    return counts["num_piecewise_graphs_seen"] == 2 * cuts + 1 and (
        counts["num_piecewise_capturable_graphs_seen"] == cuts + 1
    )


def test_piecewise_graphs(llamas, compiled):
    result = compiled["piecewise"]
    compare(result, llamas[2]["tied"])
    assert result["preemptions"] > 0
    assert is_cut_at_each_layer(result["compiled"]), result["compiled"]


# Prompts of 33 and 90 tokens, too many for the kernel that reads chosen rows; interpreting that takes long.
LONG, STEPS = slice(3, 5), 4


@pytest.fixture(scope="module")
def second_runner(llamas, interpreted_engines):
    jobs = {
        "eager": job(llamas, "paper", second=True),
        "row by row": job(llamas, "paper", backend="triton", few=LONG, second=True) | {"new": STEPS},
        "piecewise": job(llamas, "tied", piecewise=True, second=True),
    }
    return interpreted_engines.run(jobs)


@pytest.mark.parametrize("name, adapter", [("eager", "paper"), ("piecewise", "tied")])
def test_the_second_model_runner(llamas, second_runner, name, adapter):
    result = second_runner[name]
    compare(result, llamas[2][adapter])
    assert result["preemptions"] > 0
    assert result["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert is_cut_at_each_layer(result["compiled"]) == (name == "piecewise")


def test_chosen_rows_alone(llamas, second_runner):
    wanted = [{name: values[:STEPS] for name, values in request.items()} for request in llamas[2]["paper"][LONG]]
    compare(second_runner["row by row"], wanted)
    assert {name: result["row by row"] for name, result in second_runner.items()} == {
        "eager": False, "row by row": True, "piecewise": False,
    }  # fmt: skip


def test_a_second_model_runner_that_is_not_as_it_was_is_named():
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from mixlora_kernels.serving.runner import check_second_runner

    class Other(DefaultModelState):
        def preprocess_state(self, input_batch):
            """Without the block tables."""

    check_second_runner(DefaultModelState)
    with pytest.raises(ImportError, match=r"does not know this vLLM: Other\.preprocess_state is not as it was"):
        check_second_runner(Other)


@pytest.fixture(scope="module")
def tensor_parallel(llamas, engines):
    jobs = {name: job(llamas, name, {"tensor_parallel_size": 2}, processes=True) for name in ADAPTERS}
    return engines.run(jobs)


@pytest.mark.parametrize("name", ADAPTERS, ids=["heads divided", "heads of keys and values copied"])
def test_tensor_parallel(llamas, tensor_parallel, name):
    compare(tensor_parallel[name], llamas[2][name])
    assert tensor_parallel[name]["preemptions"] > 0
