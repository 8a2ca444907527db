"""Several threads at once: each gets what it gets alone."""

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mixlora_kernels.peft import ConditionalMixLoRAConfig, task_embedding

from .models import adapt, build, gradients, pad, prompts, relative, trained

THREADS, EACH = 8, 10


@pytest.fixture(autouse=True)
def hurried():
    """The interpreter changes threads every 10 us, and one operation does not keep several cores busy."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def together(calls: list) -> list:
    """The calls' results, each call in a thread of its own; all start at once."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        torch.set_num_threads(1)
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def generate(model, tokens, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(input_ids=tokens[None], attention_mask=torch.ones_like(tokens[None]), **options)[0]


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(5))
def test_generating_from_one_model(repetition):
    model = adapt(build())
    lengths = [3 + (5 * n + repetition) % 17 for n in range(THREADS * EACH)]
    instances = [prompts(1, lengths=(length,), seed=seed)[0] for seed, length in enumerate(lengths)]
    expected = [generate(model, tokens) for tokens in instances]
    own = [instances[n::THREADS] for n in range(THREADS)]
    found = together([lambda some=some: [generate(model, tokens) for tokens in some] for some in own])
    equal = [torch.equal(a, b) for n, some in enumerate(found) for a, b in zip(some, expected[n::THREADS])]
    assert sum(equal) == len(equal) == THREADS * EACH


def test_an_adapter_for_each_row_of_each_thread():
    model = adapt(build())
    config = ConditionalMixLoRAConfig(r=3, num_factors=7, init_weights=False, task_type="CAUSAL_LM")
    model.add_adapter("second", config)
    model.eval()
    instances = prompts(3) * 2
    names = ["default", "second", "__base__", "second", "default", None]
    calls = [
        lambda tokens=tokens, own={} if name is None else {"adapter_names": [name]}: generate(model, tokens, **own)
        for tokens, name in zip(instances, names)
    ]
    expected = [call() for call in calls]
    for _ in range(3):
        assert all(map(torch.equal, together(calls), expected))


def test_a_task_embedding_is_its_threads_own():
    model = adapt(build(), routing="task", task_dim=4)
    tokens = prompts(1)[0]
    tasks = torch.randn(4, 1, 4, generator=torch.Generator().manual_seed(1))

    def call(task):
        with task_embedding(model, task):
            return generate(model, tokens, output_scores=True)

    expected = [call(task) for task in tasks]
    assert not all(torch.equal(answer, expected[0]) for answer in expected)
    assert all(map(torch.equal, together([lambda task=task: call(task) for task in tasks]), expected))
    with task_embedding(model, tasks[0]), pytest.raises(ValueError, match="needs the task embedding"):
        together([lambda: generate(model, tokens)])


def train(model, seed: int, checkpointing: bool) -> list[float]:
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    losses = []
    for step in range(4):
        lengths = (5 + seed + step, 9, 4 + 2 * seed)
        ids, mask = pad(prompts(3, lengths=lengths, seed=10 * seed + step), "right")
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_training_two_copies(checkpointing):
    base = adapt(build())
    alone = [copy.deepcopy(base) for _ in range(2)]
    losses = [train(model, seed, checkpointing) for seed, model in enumerate(alone)]
    copies = [copy.deepcopy(base) for _ in range(2)]
    found = together([lambda n=n: train(copies[n], n, checkpointing) for n in range(2)])
    assert found == losses
    for model, expected in zip(copies, alone):
        for name, parameter in trained(model).items():
            assert torch.equal(parameter, trained(expected)[name]), name
            assert not torch.equal(parameter, trained(base)[name]), name


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_backward_in_another_thread(reentrant):
    """As autograd does it on a GPU: there the layers are computed anew, while this thread runs another forward."""
    model = adapt(build()).train()
    model.enable_input_require_grads()
    ids, mask = pad(prompts(3), "right", value=7)

    def loss():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        return logits.log_softmax(-1)[:, 3].sum()

    loss().backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    value, stop = loss(), threading.Event()

    def other():
        while not stop.is_set():
            with torch.no_grad():
                model(input_ids=ids[:, :4], use_cache=False)

    busy = threading.Thread(target=other)
    busy.start()
    try:
        together([value.backward])
    finally:
        stop.set()
        busy.join()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_a_copy_and_a_pickle_know_nothing_of_what_runs():
    model = adapt(build())
    ids = prompts(1)[0][None]
    expected = model(input_ids=ids).logits
    side = model.base_model.side
    side.running.forward_pass, side.running.task = object(), (torch.ones(1, 4), None)
    for other in (copy.deepcopy(side), pickle.loads(pickle.dumps(copy.copy(side)))):
        assert other.forward_pass is None and other.running.task == (None, None)
        assert other.decoder_paths == side.decoder_paths
    side.running.forward_pass, side.running.task = None, (None, None)
    assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, expected)


@pytest.mark.slow
def test_compiled_in_one_thread_and_run_in_others():
    torch.compiler.reset()
    model = adapt(build(), target_modules=["down_proj"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batches = [prompts(1, lengths=(length,), seed=length)[0][None] for length in (6, 9, 11, 6)]
    with torch.no_grad():
        expected = [model(input_ids=ids, use_cache=False).logits for ids in batches]

        def call(ids):
            with torch.no_grad():
                return compiled(input_ids=ids, use_cache=False).logits

        call(batches[0])
        # In turns: that torch.compile itself may compile in several threads at once is not promised.
        found = [together([lambda ids=ids: call(ids)])[0] for ids in batches]
    for a, b in zip(found, expected):
        assert relative(a, b) < 1e-5  # float32, in another order
    assert model.base_model.side.forward_pass is None
    torch.compiler.reset()
