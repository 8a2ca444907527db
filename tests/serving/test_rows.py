"""A step of few tokens is one launch that reads the chosen rows alone. Triton's kernels, interpreted where there is no
GPU; needs no vLLM."""

from importlib.util import find_spec

import pytest
import torch

import mixlora_kernels as mk

from .layers import MODES, Request, alone, make_parameters, make_served, mode_id, step
from .test_update import CLOSE

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no package for this platform"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted, and tensors made, on the CPU"),
]


@pytest.fixture(params=MODES, ids=mode_id)
def config(request):
    return mk.MixLoRAConfig(r=3, num_factors=7, **request.param)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the kernels that are launched."""
    from triton.runtime.interpreter import InterpretedFunction

    names, run = [], InterpretedFunction.run

    def record(self, *args, **kwargs):
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return names


def test_a_step_of_few_tokens_is_one_launch(config, launched):
    """Three requests with choices of their own, on a fused layer of three members of different widths."""
    parameters = make_parameters(config)
    layer = make_served(config, parameters, backend="triton")
    requests = [Request(prompt, 2, block, seed) for seed, (prompt, block) in enumerate([(12, 4), (9, 7), (5, 11)])]
    step(layer, [(request, request.prompt) for request in requests])
    assert launched == []  # 26 tokens × 3 slots: the products with all factors serve them
    added = step(layer, [(request, 1) for request in requests])
    assert launched == ["decode_kernel"]
    chosen = set()
    for request, y in zip(requests, added):
        wanted, routings = alone(request, config, parameters)
        torch.testing.assert_close(y, wanted[request.prompt : request.prompt + 1], **CLOSE)
        chosen.add(tuple(index for routing in routings for index in routing.index_a.flatten().tolist()))
    assert len(chosen) == len(requests)  # or the test says nothing about different choices


@pytest.mark.slow
def test_a_prefill_of_few_tokens_beside_a_decode(config, launched):
    parameters = make_parameters(config)
    layer = make_served(config, parameters, backend="triton")
    a, b = Request(12, 2, 4, 1), Request(6, 1, 9, 2)
    step(layer, [(a, 12)])
    after, prefilled = step(layer, [(a, 1), (b, 6)])
    torch.testing.assert_close(after, alone(a, config, parameters)[0][12:13], **CLOSE)
    torch.testing.assert_close(prefilled, alone(b, config, parameters)[0][:6], **CLOSE)
    assert launched == ["decode_kernel"] * 2


def test_other_rows_are_not_read(config):
    """Whatever no running request has chosen may be no number."""
    parameters = make_parameters(config)
    layer = make_served(config, parameters, backend="triton")
    requests = [Request(4, 1, 4, 1), Request(5, 1, 7, 2)]
    wanted = [alone(request, config, parameters)[0][request.prompt :] for request in requests]
    step(layer, [(request, request.prompt) for request in requests])
    blocks, E = [request.block for request in requests], config.num_factors
    unread = 0
    for g, (pool_a, pool_b) in enumerate(zip(layer.lora_A.chunk(len(layer.members)), layer.lora_B)):
        for pool, index in ((pool_a, layer.rows.index_a), (pool_b, layer.rows.index_b)):
            others = sorted(set(range(E)) - set(index[g, blocks].flatten().tolist()))
            pool[others] = float("nan")
            unread += len(others)
    assert unread > 0
    for y, right in zip(step(layer, [(request, 1) for request in requests]), wanted):
        torch.testing.assert_close(y, right, **CLOSE)


def test_many_tokens_are_not_decoded_row_by_row(launched):
    config = mk.MixLoRAConfig(r=3, num_factors=7)
    layer = make_served(config, make_parameters(config), backend="triton")
    requests = [Request(1, 1, block, block) for block in range(16)]  # blocks and seeds
    many = [Request(1, 1, 0, seed) for seed in range(22)]  # 22 tokens × 3 slots are more than 64
    step(layer, [(request, 1) for request in requests])
    assert launched == ["decode_kernel"]
    step(layer, [(request, 1) for request in many])
    assert launched == ["decode_kernel"]


def test_memory_of_what_is_kept():
    """4 bytes each for two indices and a gate, for every block, member and slot, and what serves many tokens."""
    config = mk.MixLoRAConfig(r=3, num_factors=7)
    with_rows, without = (
        make_served(config, make_parameters(config), backend=backend) for backend in ("triton", "torch")
    )
    size = {layer: sum(t.nbytes for kept in layer.kept for t in kept.tensors) for layer in (with_rows, without)}
    assert size[with_rows] - size[without] == 16 * 3 * 3 * 3 * 4
