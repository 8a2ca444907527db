"""Serving on a CPU: vLLM without an adapter, with this package's, and with its own LoRA of the same rank.

    python benchmarks/serving.py --width 2048 --out FOLDER

It runs in an environment of tests/serving/environment.sh. Servers of one random Llama run side by side, with a thread
each, and vLLM's own benchmark client asks them in turn: a round is the same requests, of ragged prompts, put to each so
that what the machine does meanwhile falls on all. Reported are the medians over the rounds, the medians of the rounds'
ratios to the server without an adapter, and how much the memory of each server has grown from the first round to the
last. Before that, each server has answered a prompt with as many tokens as it was asked for.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

VOCABULARY, R, FACTORS, LAYERS, BLOCK = 1024, 4, 16, 2, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip
SERVER = [
    "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
    "--max-num-batched-tokens", "512", "--max-num-seqs", "16", "--block-size", str(BLOCK),
    "--no-enable-chunked-prefill", "--no-enable-prefix-caching", "--served-model-name", "base",
]  # fmt: skip
FIGURES = {
    "output tokens/s": "output_throughput",
    "time to first token, ms": "median_ttft_ms",
    "time per token, ms": "median_tpot_ms",
    "99th percentile of a token, ms": "p99_itl_ms",
}
MEMORY = "memory, MiB"


def save_models(folder: Path, width: int) -> None:
    """A Llama of that width with random weights and a tokenizer of words, and adapters of all linears."""
    import torch
    import transformers as hf
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers

    from mixlora_kernels.peft import ConditionalMixLoRAConfig

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=LAYERS,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=512, bos_token_id=1,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "model")
    adapters = {
        "mixlora": ConditionalMixLoRAConfig(r=R, num_factors=FACTORS, init_weights=False),
        "tied": ConditionalMixLoRAConfig(
            r=R, num_factors=FACTORS, init_weights=False, conditioning="tied", gate="normalized"
        ),
        "lora": LoraConfig(r=R, init_lora_weights=False, target_modules=TARGETS),
    }
    for name, adapter in adapters.items():
        model = hf.LlamaForCausalLM.from_pretrained(folder / "model")
        get_peft_model(model, adapter).save_pretrained(folder / name)


def flags(name: str, folder: Path) -> list[str]:
    if name == "base":
        return []
    if name == "lora":  # 8 is the least that vLLM makes room for beside 1
        return ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"lora={folder / 'lora'}"]
    return ["--load-format", "mixlora", "--model-loader-extra-config", json.dumps({"adapter": str(folder / name)})]


@contextmanager
def serving(name: str, folder: Path, port: int, core: int):
    """A running server; its log."""
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder / "model")]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": str(core), "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *SERVER, "--port", str(port), *flags(name, folder)],
            env=environment,
            stdout=output,
            stderr=output,
        )
        try:
            yield log, process
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:  # one that is still starting may not listen
                process.kill()


def await_answer(name: str, port: int, log: Path, process: subprocess.Popen) -> None:
    """Wait until a server answers a prompt with as many tokens as it was asked for."""
    body = {"model": model_name(name), "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    deadline = time.monotonic() + 900  # a busy machine takes minutes to import vLLM
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                tokens = json.load(response)["usage"]["completion_tokens"]
            assert tokens == 4, f"{name} answered with {tokens} tokens instead of 4"
            return
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not serve:\n{log.read_text()[-4000:]}") from None
            time.sleep(1)


def model_name(name: str) -> str:
    return "lora" if name == "lora" else "base"


def ask(name: str, folder: Path, port: int, requests: int, at_a_time: int, seed: int) -> dict:
    """One run of vLLM's benchmark client."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = [
        "--backend", "openai", "--host", "127.0.0.1", "--port", str(port), "--endpoint", "/v1/completions",
        "--model", model_name(name), "--tokenizer", str(folder / "model"), "--dataset-name", "random",
        "--random-input-len", "96", "--random-range-ratio", "0.9", "--random-output-len", "32", "--ignore-eos",
        "--num-prompts", str(requests), "--max-concurrency", str(at_a_time), "--seed", str(seed), "--disable-tqdm",
        "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "99", "--temperature", "0",
    ]  # fmt: skip
    result = asyncio.run(main_async(parser.parse_args(arguments)))
    assert result["completed"] == requests, f"{name}: {result['completed']} of {requests} requests were answered"
    return {figure: result[key] for figure, key in FIGURES.items()}


def memory(process: subprocess.Popen) -> float:
    """MiB that a server's processes hold and share with no other process."""
    import psutil  # of vLLM's requirements

    parent = psutil.Process(process.pid)
    return sum(p.memory_full_info().uss for p in (parent, *parent.children(recursive=True))) / 2**20


def ask_in_turn(arguments, folder: Path, ports: dict[str, int], servers: dict[str, subprocess.Popen]) -> list[dict]:
    """The figures of each server in each round; the first round, which warms up, is left out."""
    names, rounds = list(ports), []
    for seed in range(arguments.rounds + 1):
        order = names[seed % len(names) :] + names[: seed % len(names)]
        found = {name: ask(name, folder, ports[name], arguments.requests, arguments.at_a_time, seed) for name in order}
        rounds.append({name: found[name] | {MEMORY: memory(servers[name])} for name in names})
    return rounds[1:]


def measure(arguments) -> dict:
    names = ["base", *arguments.adapters]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        save_models(folder, arguments.width)
        ports = {name: arguments.port + i for i, name in enumerate(names)}
        servers = {name: stack.enter_context(serving(name, folder, ports[name], arguments.core)) for name in names}
        for name, (log, process) in servers.items():
            await_answer(name, ports[name], log, process)
        rounds = ask_in_turn(arguments, folder, ports, {name: process for name, (_, process) in servers.items()})
        state = re.search(r"keeps (\d+) bytes for (\d+) KV blocks", servers[names[1]][0].read_text())
    return summarise(names, rounds) | {
        "width": arguments.width, "layers": LAYERS, "r": R, "num_factors": FACTORS, "requests": arguments.requests,
        "at_a_time": arguments.at_a_time, "rounds": arguments.rounds,
        "state_bytes": int(state[1]), "kv_blocks": int(state[2]), "block_size": BLOCK,
        "kv_bytes": int(state[2]) * BLOCK * 2 * LAYERS * arguments.width * 4,
    }  # fmt: skip


def summarise(names: list[str], rounds: list[dict]) -> dict:
    rows = {}
    for name in names:
        rows[name] = {figure: statistics.median(found[name][figure] for found in rounds) for figure in FIGURES}
        throughput = next(iter(FIGURES))
        ratios = [found[name][throughput] / found["base"][throughput] for found in rounds]
        rows[name]["throughput / base"] = statistics.median(ratios)
        rows[name]["least"], rows[name]["most"] = min(ratios), max(ratios)
        rows[name][MEMORY] = rounds[-1][name][MEMORY]
        rows[name]["grown, MiB"] = rounds[-1][name][MEMORY] - rounds[0][name][MEMORY]
    return {"rows": rows}


def table(result: dict) -> str:
    figures = list(next(iter(result["rows"].values())))
    lines = ["| server | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for name, row in result["rows"].items():
        lines.append(f"| {name} | " + " | ".join(f"{row[figure]:.4g}" for figure in figures) + " |")
    share = result["state_bytes"] / result["kv_bytes"]
    lines.append(
        f"\nState of the adapter: {result['state_bytes']} bytes for {result['kv_blocks']} KV blocks of "
        f"{result['block_size']} tokens, {100 * share:.2f} % of the cache's {result['kv_bytes']}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="of the Llama's hidden states")
    parser.add_argument("--adapters", nargs="+", default=["mixlora", "lora"], choices=["mixlora", "tied", "lora"])
    parser.add_argument("--requests", type=int, default=24, help="of a round, for each server")
    parser.add_argument("--at-a-time", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=0, help="that the servers' threads are bound to")
    parser.add_argument("--port", type=int, default=8210, help="of the first server; the others take the next ones")
    parser.add_argument("--out", type=Path, help="folder for the results, as JSON and as a table")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT, VLLM_LOGGING_LEVEL="ERROR")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # whoever stops it stops the servers as well
    result = measure(arguments)
    print(table(result))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"serving_{arguments.width}.json").write_text(json.dumps(result, indent=1) + "\n")
        (arguments.out / f"serving_{arguments.width}.md").write_text(table(result) + "\n")


if __name__ == "__main__":
    main()
