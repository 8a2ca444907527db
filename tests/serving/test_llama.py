"""A Llama with an adapter in vLLM against Hugging Face's generate: tokens and log-probabilities of every request."""

import pytest

from .conftest import needs_vllm

pytestmark = needs_vllm

#: Adapters, by name: every conditioning and every gate once.
ADAPTERS = {
    "paper": {},
    "tied": {"conditioning": "tied", "gate": "normalized"},
    "weighted": {"conditioning": "none", "gate": "weighted"},
    "published": {"conditioning": "published", "gate": "binary"},
}
# Blocks of 32 tokens: enough for one request of 90 + 40 tokens and a little more, so that requests are preempted.
FEW_BLOCKS = 9


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Folders of the model and of each adapter, and what generate gives for the prompts."""
    from .models import generate, make_prompts, save_adapter, save_llama

    folder = tmp_path_factory.mktemp("llama")
    prompts, wanted = make_prompts(), {}
    for name, settings in ADAPTERS.items():
        adapted = save_adapter(save_llama(folder / "model"), folder / name, **settings)
        few = prompts if name in ("paper", "tied") else prompts[:4]
        wanted[name] = [generate(adapted, prompt) for prompt in few]
    return folder, prompts, wanted


def job(llama, adapter: str, at_a_time: int, blocks: int | None = None, **more) -> dict:
    folder, prompts, wanted = llama
    engine = {
        "model": str(folder / "model"),
        "model_loader_extra_config": {"adapter": str(folder / adapter)},
        "max_num_seqs": at_a_time,
        "num_gpu_blocks_override": blocks or 100,
    }
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts[: len(wanted[adapter])]]
    return {"engine": engine, "prompts": prompts, "new": 40, **more}


@pytest.fixture(scope="module")
def results(llama, engines):
    """Of engines in their jobs' processes, by the jobs' names."""
    jobs = {
        "paper, 4 at a time, preempted": job(llama, "paper", 4, FEW_BLOCKS),
        "paper, 8 at a time, preempted": job(llama, "paper", 8, FEW_BLOCKS),
        "tied, 4 at a time, preempted": job(llama, "tied", 4, FEW_BLOCKS),
        "tied, 8 at a time": job(llama, "tied", 8),
        "weighted": job(llama, "weighted", 4),
        "published": job(llama, "published", 4),
        "control": job(llama, "paper", 8, FEW_BLOCKS, control=True),
    }
    return engines.run(jobs)


def compare(result: dict, wanted: list[dict]) -> None:
    assert "error" not in result, result["error"]
    assert result["tokens"] == [request["tokens"] for request in wanted]
    for got, request in zip(result["logprobs"], wanted):
        # float32 through three layers of width 128, log-probabilities of a magnitude of up to 10.
        assert got == pytest.approx(request["logprobs"], abs=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "paper, 4 at a time, preempted", "paper, 8 at a time, preempted", "tied, 4 at a time, preempted",
        "tied, 8 at a time", "weighted", "published",
    ],
)  # fmt: skip
def test_tokens_are_those_of_generate(llama, results, name):
    result = results[name]
    compare(result, llama[2][name.partition(",")[0]])
    assert (result["preemptions"] > 0) == ("preempted" in name)


def test_the_control_fails(llama, results):
    """Pooling generated tokens where a request is computed again gives other tokens: the test above would see it."""
    control = results["control"]
    assert control["preemptions"] > 0
    assert control["tokens"] != [request["tokens"] for request in llama[2]["paper"]]


def test_the_adapter_matters(llama):
    """The adapters give different tokens, so that equal tokens say something."""
    firsts = [tuple(llama[2][name][1]["tokens"]) for name in ADAPTERS]
    assert len(set(firsts)) == len(firsts)


@pytest.fixture(scope="module")
def from_processes(llama, engines):
    jobs = {
        "tied": job(llama, "tied", 4, FEW_BLOCKS, processes=True),
        "paper": job(llama, "paper", 8, FEW_BLOCKS, processes=True),
    }
    return engines.run(jobs)


@pytest.mark.parametrize("name", ["tied", "paper"], ids=["4 at a time", "8 at a time"])
def test_tokens_are_those_of_generate_from_separate_processes(llama, from_processes, name):
    compare(from_processes[name], llama[2][name])
    assert from_processes[name]["preemptions"] > 0
