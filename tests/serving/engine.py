"""Run a list of jobs on vLLM engines: ``python -m tests.serving.engine JOBS.json RESULTS.json``, one after the other.

A process of its own for them, because vLLM sets up its process once, and for good. A job has

    engine      arguments of vllm.LLM
    prompts     each with prompt_token_ids, and with multi_modal_data where it has pictures (their paths)
    new         tokens to generate for each
    control     true: pool the generated tokens as well when a request is computed again
    pictures    tokens of pictures that a step takes at most, and that are kept (of an engine in this process)
    cut         true: vLLM's own way with pictures that do not fit, in a scheduler that was not refused
    piecewise   true: graphs in pieces, as on a GPU, which vLLM takes for other graphs on a CPU

and its result ``tokens`` and ``logprobs`` for each prompt, ``preemptions``, ``runner`` (the module of the model runner
of an engine in this process), ``row by row`` (whether few tokens take the kernel that reads chosen rows, in such an
engine), ``compiled`` (what vLLM counted of its graphs), or ``error``.

Under ``TRITON_INTERPRET=1`` vLLM's Triton kernels run in Triton's interpreter, which vLLM's second model runner needs
where there is no GPU.
"""

import json
import os
import sys
from pathlib import Path

# In the process that starts vLLM, before it is imported.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
#: What a MixLoRA adapter needs, and what keeps a test small.
ENGINE = {
    "load_format": "mixlora",
    "dtype": "float32",
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "enable_prefix_caching": False,
    "max_model_len": 256,
    "max_num_batched_tokens": 256,
    "block_size": 32,
    "disable_log_stats": False,
    "skip_tokenizer_init": True,
}


def pool_generated_tokens() -> None:
    """The control: what a step computes of a request that begins is taken for its prompt."""
    from mixlora_kernels.serving.batch import Batch

    begin = Batch.begin

    def begin_wrongly(self, starts, computed, prompt_lengths, first_blocks):
        lengths = starts[1:] - starts[:-1]
        prompt_lengths = [n if done else length for n, done, length in zip(prompt_lengths, computed, lengths)]
        import numpy as np

        begin(self, starts, computed, np.array(prompt_lengths), first_blocks)

    Batch.begin = begin_wrongly


def let_triton_interpret() -> None:
    """Have vLLM for CPUs take Triton as it is. It asks Triton for a backend that compiles for CPUs, which an
    interpreter has no use for."""
    from triton.backends import Backend, backends

    class Driver:
        is_active = staticmethod(lambda: True)

    backends["cpu"] = Backend(compiler=None, driver=Driver)


def keep_pieces() -> None:
    """Undo that vLLM takes graphs in pieces for other graphs on a CPU."""
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_but_compilation(config):
        given = config.compilation_config.backend
        check(config)
        config.compilation_config.mode, config.compilation_config.backend = CompilationMode.VLLM_COMPILE, given

    CpuPlatform.check_and_update_config = staticmethod(check_but_compilation)


def limit_pictures(scheduler, tokens: int) -> None:
    """Let a step encode pictures of so many tokens, and keep so many."""
    cache = scheduler.encoder_cache_manager
    assert cache.num_free_slots == cache.num_freeable_slots == cache.cache_size, "pictures are kept already"
    scheduler.max_num_encoder_input_tokens = tokens
    cache.cache_size = cache.num_free_slots = cache.num_freeable_slots = tokens


#: Graphs in pieces; each piece runs as it was traced, because compiling it takes long and says nothing about its cut.
PIECEWISE = {
    "mode": 3,
    "backend": "eager",
    "cudagraph_mode": "NONE",
    "compile_sizes": [],
    # Passes of which vLLM's build for CPUs lacks the kernels.
    "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},
}


def run(job: dict) -> dict:
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter
    from vllm.distributed import cleanup_dist_env_and_memory

    from mixlora_kernels.serving.layer import ServedLayer

    if job.get("control"):
        pool_generated_tokens()
    options = {**ENGINE, **job["engine"]}
    if job.get("piecewise"):
        keep_pieces()  # for good: such a job is its process's last
        options |= {"enforce_eager": False, "compilation_config": PIECEWISE}
    before = vars(compilation_counter).copy()
    try:
        llm = LLM(**options)
    except Exception as error:  # what is refused is a result
        cleanup_dist_env_and_memory()
        return {"error": f"{type(error).__name__}: {error}"}
    core = llm.llm_engine.engine_core
    if "pictures" in job:
        limit_pictures(core.engine_core.scheduler, job["pictures"])
    if job.get("cut"):
        from vllm.v1.core.sched.scheduler import Scheduler

        scheduler = core.engine_core.scheduler
        scheduler._try_schedule_encoder_inputs = Scheduler._try_schedule_encoder_inputs.__get__(scheduler)
    prompts = [
        {**p, "multi_modal_data": {"image": [Image.open(file) for file in p["multi_modal_data"]]}}
        if "multi_modal_data" in p
        else p
        for p in job["prompts"]
    ]
    sampling = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False, logprobs=0)
    try:
        outputs = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False)]
    except Exception as error:
        core.shutdown()
        cleanup_dist_env_and_memory()
        return {"error": f"{type(error).__name__}: {error}"}
    preemptions = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    result = {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [step[token].logprob for step, token in zip(output.logprobs, output.token_ids)] for output in outputs
        ],
        "preemptions": preemptions,
        "compiled": {name: count - before[name] for name, count in vars(compilation_counter).items()},
    }
    if hasattr(core, "engine_core") and hasattr(core.engine_core.model_executor, "driver_worker"):
        runner = core.engine_core.model_executor.driver_worker.worker.model_runner
        layers = [module for module in runner.get_model().modules() if isinstance(module, ServedLayer)]
        result["runner"] = type(runner).__module__
        result["row by row"] = all(layer.rows is not None for layer in layers)
    core.shutdown()
    del llm, core
    cleanup_dist_env_and_memory()
    return result


def main() -> None:
    jobs, results = map(Path, sys.argv[1:])
    if os.environ.get("TRITON_INTERPRET") == "1":
        let_triton_interpret()
    results.write_text(json.dumps([run(job) for job in json.loads(jobs.read_text())]))


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main()
