"""Jobs on vLLM engines, each in a process of its own, because vLLM sets up its process once, and for good.

Importing vLLM takes longer than most jobs, so that ``serve`` imports it once and forks a process for each. A job has

    engine      arguments of vllm.LLM
    prompts     each with prompt_token_ids, and with multi_modal_data where it has pictures (their paths)
    new         tokens to generate for each
    processes   true: the engine and its workers in processes of their own, forked, as vLLM does on a GPU's host; on a
                CPU it spawns them, as the server of test_server.py does. Otherwise the engine is in the job's process
    control     true: pool the generated tokens as well when a request is computed again
    pictures    tokens of pictures that a step takes at most, and that are kept (of an engine in the job's process)
    cut         true: vLLM's own way with pictures that do not fit, in a scheduler that was not refused
    piecewise   true: graphs in pieces, as on a GPU, which vLLM takes for other graphs on a CPU
    second      true: vLLM's second model runner
    again       further rounds of the same prompts (of an engine in the job's process)

and its result ``tokens`` and ``logprobs`` for each prompt, ``preemptions``, ``runner`` (the module of the model runner
of an engine in the job's process), ``row by row`` (whether few tokens take the kernel that reads chosen rows, in such
an engine), ``compiled`` (what vLLM counted of its graphs), ``held`` (after each round of ``again``, what ``held``
counts), or ``error``.

A job with ``serve``, arguments of ``vllm serve`` with which it ends by itself, such as those that are refused, has a
server with forked processes instead, and the result ``log``, what it wrote, and ``exit``, its exit code.

Under ``TRITON_INTERPRET=1`` vLLM's Triton kernels run in Triton's interpreter, which vLLM's second model runner needs
where there is no GPU.
"""

import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
import tracemalloc
from collections.abc import Callable
from multiprocessing.connection import Connection
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
#: What every job's process would import, but for the plug-in, which vLLM has to find.
IMPORTED = (
    "mixlora_kernels.peft",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.llava",
)
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

    def begin_wrongly(self, starts, computed, prompt_lengths, first_blocks, ids):
        lengths = starts[1:] - starts[:-1]
        prompt_lengths = [n if done else length for n, done, length in zip(prompt_lengths, computed, lengths)]
        import numpy as np

        begin(self, starts, computed, np.array(prompt_lengths), first_blocks, ids)

    Batch.begin = begin_wrongly


def let_triton_interpret() -> None:
    """Have vLLM for CPUs take Triton as it is. It asks Triton for a backend that compiles for CPUs, which an
    interpreter has no use for."""
    from triton.backends import Backend, backends

    class Driver:
        is_active = staticmethod(lambda: True)

    backends["cpu"] = Backend(compiler=None, driver=Driver)


def after_the_check_for_cpus(change: Callable) -> None:
    """Change what vLLM sets where it runs on a CPU."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_change(config):
        check(config)
        change(config)

    CpuPlatform.check_and_update_config = staticmethod(check_and_change)


def keep_pieces(config) -> None:
    """Undo that vLLM takes graphs in pieces for other graphs on a CPU."""
    from vllm.config import CompilationMode

    config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    config.compilation_config.backend = PIECEWISE["backend"]


def fork_processes(_config) -> None:
    """Undo that vLLM spawns its processes on a CPU."""
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"


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


def prepare(job: dict) -> dict:
    """Set up this process for a job: the arguments of vllm.LLM."""
    import torch

    options = {**ENGINE, **job["engine"]}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(job.get("processes", False)))
    if job.get("second"):
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    if job.get("processes"):
        after_the_check_for_cpus(fork_processes)
    if job.get("control"):
        pool_generated_tokens()
    if job.get("piecewise"):
        after_the_check_for_cpus(keep_pieces)
        options |= {"enforce_eager": False, "compilation_config": PIECEWISE}
    if options["enforce_eager"]:  # vLLM compiles what ranks a token among others all the same, which takes seconds
        torch.compiler.set_stance("force_eager")
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # of processes that it spawns
    return options


def prompts_of(job: dict) -> list[dict]:
    from PIL import Image

    return [
        {**p, "multi_modal_data": {"image": [Image.open(file) for file in p["multi_modal_data"]]}}
        if "multi_modal_data" in p
        else p
        for p in job["prompts"]
    ]


def serve_until_it_ends(arguments: list[str]) -> dict:
    """Run ``vllm serve``: what it and its processes wrote, and its exit code."""
    after_the_check_for_cpus(fork_processes)
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", "serve", *arguments]
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        log.seek(0)
        return {"log": log.read().decode(), "exit": code}


def run(job: dict) -> dict:
    options = prepare(job)
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter
    from vllm.v1.core.sched.scheduler import Scheduler

    from mixlora_kernels.serving.layer import ServedLayer

    before = vars(compilation_counter).copy()
    try:
        llm = LLM(**options)
    except Exception as error:  # what is refused is a result
        return {"error": f"{type(error).__name__}: {error}"}
    core = llm.llm_engine.engine_core
    if "pictures" in job:
        limit_pictures(core.engine_core.scheduler, job["pictures"])
    if job.get("cut"):
        scheduler = core.engine_core.scheduler
        scheduler._try_schedule_encoder_inputs = Scheduler._try_schedule_encoder_inputs.__get__(scheduler)
    sampling = SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False, logprobs=0)
    try:
        outputs = [request.outputs[0] for request in llm.generate(prompts_of(job), sampling, use_tqdm=False)]
        result = result_of(outputs)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    result["preemptions"] = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    result["compiled"] = {name: count - before[name] for name, count in vars(compilation_counter).items()}
    if "again" in job:
        result["held"] = []
        tracemalloc.start(3)  # frames, as a call of the package's may allocate in a function of Python's library
        for _ in range(job["again"]):
            llm.generate(prompts_of(job), sampling, use_tqdm=False)
            result["held"].append(held())
    if not job.get("processes"):
        runner = core.engine_core.model_executor.driver_worker.worker.model_runner
        layers = [module for module in runner.get_model().modules() if isinstance(module, ServedLayer)]
        result["runner"] = type(runner).__module__
        result["row by row"] = all(layer.rows is not None for layer in layers)
    if job.get("processes"):
        core.shutdown()  # ends them
    return result


def held() -> tuple[int, int]:
    """The bytes that this process holds in tensors, and in what the package's lines, or what they call, have allocated
    since tracemalloc was started. Tensors that vLLM has frozen after it started are not among them."""
    import torch

    import mixlora_kernels

    gc.collect()
    files = tracemalloc.Filter(True, str(Path(mixlora_kernels.__file__).parent / "*"), all_frames=True)
    own = tracemalloc.take_snapshot().filter_traces([files])
    storages = (t.untyped_storage() for t in gc.get_objects() if isinstance(t, torch.Tensor))
    tensors = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(tensors.values()), sum(statistic.size for statistic in own.statistics("filename"))


def result_of(outputs: list) -> dict:
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [step[token].logprob for step, token in zip(output.logprobs, output.token_ids)] for output in outputs
        ],
    }


def answer(job: dict, results: Connection) -> None:
    """A job's process."""
    try:
        results.send(serve_until_it_ends(job["serve"]) if "serve" in job else run(job))
    except BaseException:
        results.send({"error": traceback.format_exc()})
        raise


def serve(jobs: Connection) -> None:
    """Run the jobs that come in, one after the other, and send each one's result, until None comes in."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        let_triton_interpret()
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # what a job's process need not look through
    fork = multiprocessing.get_context("fork")
    while (job := jobs.recv()) is not None:
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=answer, args=(job, theirs))
        process.start()
        theirs.close()
        try:
            result = ours.recv()
        except EOFError:  # it died
            process.join()
            result = {"error": f"the job's process ended with exit code {process.exitcode}"}
        process.join()
        jobs.send(result)
