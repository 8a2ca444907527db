"""The operation of a fused layer against the package's own, request by request. Needs no vLLM."""

import pytest
import torch

import mixlora_kernels as mk
from mixlora_kernels.serving.routing import choose, logits_of, router_matrix, table_of

from .layers import D_IN, MODES, Request, alone, make_parameters, make_served, mode_id, step

# float32 sums of at most 12 products of numbers around 1, twice, times a scaling of 14/3.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture(params=MODES, ids=mode_id)
def config(request):
    return mk.MixLoRAConfig(r=3, num_factors=7, **request.param)


def test_requests_come_and_go_as_if_each_were_alone(config):
    parameters = make_parameters(config)
    layer = make_served(config, parameters)
    a, b, c = Request(5, 3, 4, 1), Request(9, 2, 7, 2), Request(2, 4, 11, 3)
    got = {a: [], b: [], c: []}
    for tokens in (
        [(a, 5)],  # a prefill alone
        [(a, 1), (b, 9)],  # a prefill beside a decode
        [(c, 2), (b, 1), (a, 1)],  # in another order
        [(a, 1), (c, 1), (b, 1)],  # decodes alone
        [(c, 3)],
    ):
        for (request, _), y in zip(tokens, step(layer, tokens)):
            got[request].append(y)
    for request, parts in got.items():
        wanted, _ = alone(request, config, parameters)
        torch.testing.assert_close(torch.cat(parts), wanted, **CLOSE)


def test_a_preempted_request_keeps_the_routing_of_its_prompt(config):
    parameters = make_parameters(config)
    layer = make_served(config, parameters)
    a, b = Request(5, 3, 4, 1), Request(6, 1, 9, 2)
    step(layer, [(a, 5)])
    step(layer, [(a, 1)])
    step(layer, [(b, 6)])
    b.block, a.block, a.computed = 4, 2, 0  # its blocks went to others; it comes back with other blocks
    (again,) = step(layer, [(a, 7)])  # prompt and generated tokens as one
    (last,) = step(layer, [(a, 1)])
    wanted, _ = alone(a, config, parameters)
    torch.testing.assert_close(torch.cat((again, last)), wanted, **CLOSE)


def test_a_prompt_is_routed_by_its_text(config):
    """Without the tokens that stand for images; by all of them where there is no text. Again after a preemption."""
    parameters, media = make_parameters(config), (8, 9)
    layer = make_served(config, parameters, media=media)
    a, b, c = Request(6, 2, 4, 1), Request(4, 1, 7, 2), Request(3, 1, 9, 3)
    a.ids[[1, 2, 4, 7]] = 9, 8, 9, 9  # the last one is generated
    b.ids[:4] = 9
    got = {a: [], b: [], c: []}
    for tokens in ([(a, 6), (c, 3)], [(b, 4), (a, 1)], [(c, 1), (b, 1)]):
        for (request, _), y in zip(tokens, step(layer, tokens)):
            got[request].append(y)
    a.computed = 0
    got[a] = step(layer, [(a, 8)])
    for request, left_out in ((a, media), (b, ()), (c, media)):
        wanted, _ = alone(request, config, parameters, left_out)
        torch.testing.assert_close(torch.cat(got[request]), wanted, **CLOSE)
    layer.batch.media = ()
    a.computed = 0
    (whole,) = step(layer, [(a, 8)])
    assert (whole - got[a][0]).abs().max() > 0.1


def test_a_pool_over_generated_tokens_would_be_seen():
    """The control of the test above: with these parameters the routing of all tokens differs from the prompt's."""
    config = mk.MixLoRAConfig(r=3, num_factors=7)
    parameters = make_parameters(config)
    layer, a = make_served(config, parameters), Request(5, 3, 4, 1)
    prompt, a.prompt = a.prompt, 7
    (wrong,) = step(layer, [(a, 7)])
    a.prompt = prompt
    wanted, _ = alone(a, config, parameters)
    assert (wrong - wanted[:7]).abs().max() > 0.1


def test_choices_are_the_packages_bit_for_bit(config):
    parameters = make_parameters(config, d_outs=(6,))[0]
    pooled = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(5))
    pooled[1] = 0  # all logits equal: ties go to the lower index
    table = table_of(parameters["lora_A"], parameters.get("router_AB"), config)
    routers = router_matrix(parameters["router_A"], parameters.get("router_B"))
    choice = choose(logits_of(pooled, routers, config), table, config)
    factors = mk.Factors(*(parameters.get(name) for name in mk.Factors._fields))
    _, routing = mk.mixlora(pooled.unsqueeze(1), torch.zeros(40, 1, 6), factors, config, backend="torch")
    assert torch.equal(choice.index_a, routing.index_a)
    assert torch.equal(choice.index_b, routing.index_b)
    assert torch.equal(choice.gate, routing.gate)
    if not config.chooses_b or config.conditioning == "none":
        assert choice.index_a[1].tolist() == [0, 1, 2]


def test_some_members_alone_are_adapted():
    """q and v without k: k's columns of the output stay as they are."""
    config = mk.MixLoRAConfig(r=3, num_factors=7)
    parameters = make_parameters(config)
    whole, a = make_served(config, parameters), Request(5, 0, 4, 1)
    (wanted,) = step(whole, [(a, 5)])
    part = make_served(config, parameters)
    members = part.members[0], part.members[2]
    part = type(part)(
        members, [parameters[0], parameters[2]], config, part.batch, dtype=torch.float32, device=torch.device("cpu")
    )
    part.reserve(16)
    a.computed = 0
    (got,) = step(part, [(a, 5)])
    q, k, v = (slice(m.start, m.stop) for m in whole.members)
    torch.testing.assert_close(got[:, q], wanted[:, q])
    torch.testing.assert_close(got[:, v], wanted[:, v])
    assert not got[:, k].any() and wanted[:, k].any()


def tensors_of(layer) -> list[torch.Tensor]:
    return [layer.batch.blocks, *(tensor for kept in layer.kept for tensor in kept.tensors)]


def test_nothing_grows_with_the_number_of_requests():
    config = mk.MixLoRAConfig(r=3, num_factors=7)
    layer = make_served(config, make_parameters(config))
    before = [(tensor.data_ptr(), tensor.shape) for tensor in tensors_of(layer)]
    for seed in range(50):
        step(layer, [(Request(4, 0, seed % 16, seed), 4)])
    assert [(tensor.data_ptr(), tensor.shape) for tensor in tensors_of(layer)] == before
    assert not layer.batch.prompts


@pytest.mark.parametrize("computed, tokens", [(0, 4), (4, 5)], ids=["first piece", "second piece"])
def test_a_prompt_in_pieces_stops_the_step(computed, tokens):
    config = mk.MixLoRAConfig(r=3, num_factors=7)
    layer, a = make_served(config, make_parameters(config)), Request(9, 0, 4, 1)
    a.computed = computed
    with pytest.raises(RuntimeError, match=f"the tokens {computed} to {computed + tokens} of a prompt of 9"):
        step(layer, [(a, tokens)])
