"""A LLaVA with an adapter and a trained projector in vLLM against Hugging Face's generate, with images and without."""

import copy
import re

import pytest

from .conftest import needs_vllm
from .loading import DOCUMENTED, load
from .test_llama import compare

pytestmark = needs_vllm

SCHEDULER = "mixlora_kernels.serving.scheduler.WholePromptScheduler"
#: Pictures in each of the prompts.
PICTURES = (1, 0, 2, 1, 0, 1, 2, 0)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The folder of the model and of two adapters, which are routed by the prompt and by its text; the prompts as vLLM
    takes them; and what generate gives for each, by adapter."""
    from .models import IMAGE, IMAGE_TOKENS, generate, make_picture, make_prompts, save_adapter, save_llava

    folder = tmp_path_factory.mktemp("llava")
    model, processor = save_llava(folder / "model")
    adapted = {
        pool: save_adapter(copy.deepcopy(model), folder / pool, modules_to_save=["multi_modal_projector"], pool=pool)
        for pool in ("prompt", "text")
    }
    prompts, wanted = [], {pool: [] for pool in adapted}
    for number, (text, pictures) in enumerate(zip(make_prompts(), PICTURES)):
        files = [folder / f"{number}-{i}.png" for i in range(pictures)]
        images = [make_picture(file, seed=10 * number + i) for i, file in enumerate(files)]
        pixels = processor.image_processor(images, return_tensors="pt") if images else {}
        tokens, expanded = [*text[:2]], [*text[:2]]
        for _ in images:  # one token for vLLM, which expands it; as many as patches for transformers
            tokens += [IMAGE]
            expanded += [IMAGE] * IMAGE_TOKENS
        prompt = {"prompt_token_ids": tokens + text[2:]}
        prompts.append({**prompt, "multi_modal_data": list(map(str, files))} if files else prompt)
        for pool, own in adapted.items():
            wanted[pool].append(generate(own, expanded + text[2:], **pixels))
    return folder, prompts, wanted


def job(llava, blocks: int, adapter: str = "prompt", **engine) -> dict:
    folder, prompts, _ = llava
    options = {
        "model": str(folder / "model"),
        "model_loader_extra_config": {"adapter": str(folder / adapter)},
        "skip_tokenizer_init": False,
        "limit_mm_per_prompt": {"image": 2},
        "mm_processor_cache_gb": 0,
        "max_num_seqs": 4,
        "num_gpu_blocks_override": blocks,
        "scheduler_cls": SCHEDULER,
    }
    return {"engine": {**options, **engine}, "prompts": prompts, "new": 40}


@pytest.fixture(scope="module")
def results(llava, engines):
    jobs = {
        "room": job(llava, 100),
        "preempted": job(llava, 9),
        "text": job(llava, 9, "text"),
        # A step takes two pictures, and so many have room between steps: a prompt of two waits behind one of one.
        "two pictures a step": job(llava, 100) | {"pictures": 32},
        "two pictures a step, cut": job(llava, 100) | {"pictures": 32, "cut": True},
        "vLLM's own scheduler": job(llava, 100, scheduler_cls=None),
    }
    return engines.run(jobs)


@pytest.mark.parametrize("name", ["room", "preempted", "two pictures a step", "text"])
def test_tokens_are_those_of_generate(llava, results, name):
    compare(results[name], llava[2]["text" if name == "text" else "prompt"])
    assert (results[name]["preemptions"] > 0) == (name in ("preempted", "text"))


def test_vllms_own_scheduler_is_refused(results):
    message = (
        "images can cut a prompt where vLLM's own scheduler has spent a step's budget for them. Add --scheduler-cls "
        f"{SCHEDULER}, by which such a prompt waits for the next step, or --language-model-only"
    )
    assert f"- {message}" in results["vLLM's own scheduler"]["error"]
    assert message in DOCUMENTED


def test_a_budget_for_pictures_that_a_prompt_could_exceed_is_refused(llava, offline):
    """A prompt of so many pictures would wait for ever. vLLM makes the budget no smaller than a step."""
    message = (
        "max_num_encoder_input_tokens=64 is less than max_model_len=256: a prompt of many images would wait for ever. "
        "Set --max-num-batched-tokens 256 or more"
    )
    options = job(llava, 100)["engine"]
    with pytest.raises(ValueError, match=re.escape(f"- {message}")):
        load(llava[0], lambda config: setattr(config.scheduler_config, "max_num_encoder_input_tokens", 64), **options)
    assert message in DOCUMENTED


def test_a_prompt_that_is_cut_stops_the_engine(results):
    """The control of a scheduler that waits: without it vLLM cuts a prompt, and the worker's own check sees it."""
    assert (
        "RuntimeError: a step computes the tokens 0 to 18 of a prompt of"
        in results["two pictures a step, cut"]["error"]
    )


def test_pictures_matter(llava):
    """Prompts that differ in their pictures alone would be told apart: pictures change the tokens."""
    _, prompts, wanted = llava
    assert wanted["prompt"][0]["tokens"] != wanted["prompt"][1]["tokens"]
    assert wanted["prompt"][0]["tokens"] != wanted["text"][0]["tokens"]
    assert sum("multi_modal_data" in prompt for prompt in prompts) == 5


def test_tokens_are_those_of_generate_from_separate_processes(llava, engines):
    result = engines.run({"preempted": job(llava, 9) | {"processes": True}})["preempted"]
    compare(result, llava[2]["prompt"])
    assert result["preemptions"] > 0


def test_requests_leave_nothing_behind(llava, engines):
    """Counted, because the memory of a whole process also grows with each new size of a step."""
    held = engines.run({"again": job(llava, 9) | {"new": 8, "again": 40}})["again"]["held"][10:]
    assert len({tensors for tensors, _ in held}) == 1
    own, requests = [own for _, own in held], (len(held) - 1) * len(PICTURES)
    assert min(own) > 0  # or the package's files were not found
    # Python reuses small blocks that were allocated for the package, so that what they take comes and goes. A
    # ``Prompt`` takes 80 bytes.
    assert own[-1] - own[0] < 40 * requests, own
