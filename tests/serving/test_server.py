"""``vllm serve`` with a LLaVA and an adapter: 200 requests from 16 clients, streamed and not, with pictures and
without. They are answered as Hugging Face's generate answers each of them alone."""

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from .conftest import ROOT, engine_environment, needs_vllm
from .test_llava import SCHEDULER

pytestmark = needs_vllm

CLIENTS, REQUESTS, NEW, QUESTIONS = 16, 200, 16, 20


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A folder of model and adapter, and questions: a path of the API, what to post there, the words of the answer."""
    import torch

    from .models import IMAGE, IMAGE_TOKENS, generate, make_picture, save_adapter, save_llava

    folder = tmp_path_factory.mktemp("server")
    model, processor = save_llava(folder / "model")
    adapted = save_adapter(model, folder / "adapter", conditioning="tied", gate="normalized")
    options = {"model": "served", "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "skip_special_tokens": False}
    generator, asked = torch.Generator().manual_seed(2), []
    for number in range(QUESTIONS):
        text = torch.randint(3, IMAGE, (5 + 3 * number,), generator=generator).tolist()
        pixels, prompt = {}, text
        if number % 4 == 0:
            file = folder / f"{number}.png"
            pixels = processor.image_processor(make_picture(file, seed=number), return_tensors="pt")
            prompt = [3, *[IMAGE] * IMAGE_TOKENS, *text, 4]  # as the chat template writes it
            url = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": " ".join(f"w{token}" for token in text)},
            ]
            question = "/v1/chat/completions", options | {"messages": [{"role": "user", "content": content}]}
        else:
            question = "/v1/completions", options | {"prompt": prompt}
        answer = generate(adapted, prompt, NEW, **pixels)["tokens"]
        asked.append((*question, processor.tokenizer.decode(answer).split()))
    return folder, asked


@pytest.fixture(scope="module")
def server(questions, tmp_path_factory):
    """The address of a running server."""
    folder, _ = questions
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder / "model"),
        "--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port),
        "--load-format", "mixlora", "--model-loader-extra-config", json.dumps({"adapter": str(folder / "adapter")}),
        "--no-enable-chunked-prefill", "--no-enable-prefix-caching", "--enforce-eager", "--scheduler-cls", SCHEDULER,
        "--dtype", "float32", "--max-model-len", "256", "--max-num-batched-tokens", "256", "--max-num-seqs", "8",
        "--block-size", "32", "--num-gpu-blocks-override", "40", "--mm-processor-cache-gb", "0",
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=engine_environment(), stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 900  # a busy machine takes minutes to import vLLM
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:  # one that is still starting may not listen
            process.kill()


def ask(address: str, path: str, body: dict, stream: bool) -> tuple[list[str], int]:
    """The words of an answer, and the pieces that it came in."""
    request = urllib.request.Request(
        address + path, json.dumps(body | {"stream": stream}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        if not stream:
            choice = json.load(response)["choices"][0]
            return (choice["text"] if "text" in choice else choice["message"]["content"]).split(), 1
        text, pieces = "", 0
        for line in response:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                for choice in json.loads(line[6:])["choices"]:
                    piece = choice["text"] if "text" in choice else choice["delta"].get("content")
                    text, pieces = text + (piece or ""), pieces + bool(piece)
        return text.split(), pieces


def test_200_requests_from_16_clients(questions, server):
    _, asked = questions
    work = [(*asked[number % QUESTIONS], number % 2 == 1) for number in range(REQUESTS)]

    def answer(item):
        path, body, _, stream = item
        return ask(server, path, body, stream)

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(answer, work))
    assert [words for words, _ in answers] == [item[2] for item in work]
    # A server that has much to do joins pieces that wait, at times all of an answer.
    streamed = [pieces for (_, pieces), item in zip(answers, work) if item[3]]
    assert len(streamed) == REQUESTS / 2 and sum(streamed) > 2 * len(streamed)


def test_a_server_names_what_it_refuses(questions, engines):
    """Without the flags the server does not start, and its log names each of them."""
    folder, _ = questions
    arguments = [
        str(folder / "model"),
        "--load-format", "mixlora", "--model-loader-extra-config", json.dumps({"adapter": str(folder / "adapter")}),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1", "--block-size", "32",
    ]  # fmt: skip
    result = engines.run({"refused": {"serve": arguments}})["refused"]
    assert result["exit"] != 0
    for flag in ("--no-enable-chunked-prefill", "--no-enable-prefix-caching", f"--scheduler-cls {SCHEDULER}"):
        assert f"Add {flag}" in result["log"]
