"""Dropout in the kernels: the mask is Philox's, whatever the tiles, and the backward's is the forward's."""

import numpy
import pytest
import torch

import mixlora_kernels as mk
from mixlora_kernels.backends import reference
from mixlora_kernels.backends.base import Factors, Group, Needs, Options
from mixlora_kernels.dropout import dropped_levels, keep_scale
from mixlora_kernels.routing import Instances, Routing

from ..cases import assert_same, make_input, make_layer, make_mask, relative_error, run

KERNELS = pytest.importorskip("mixlora_kernels.backends.kernels").KERNELS

CLOSE = 1e-5  # as in test_layer.py


def philox(seed: int, counter: numpy.ndarray, rounds: int = 7) -> numpy.ndarray:
    """Philox 4x32 from its paper: counters [..., 4] to words [..., 4], the key being the seed's halves."""
    c = [counter[..., i].astype(numpy.uint64) for i in range(4)]
    key, low = [seed & 0xFFFFFFFF, seed >> 32], numpy.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        a, b = numpy.uint64(0xD2511F53) * c[0], numpy.uint64(0xCD9E8D57) * c[2]
        high = numpy.uint64(32)
        c = [(b >> high) ^ c[1] ^ numpy.uint64(key[0]), b & low, (a >> high) ^ c[3] ^ numpy.uint64(key[1]), a & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return numpy.stack(c, -1)


def expected_mask(seed: torch.Tensor, N: int, D: int, p: float) -> torch.Tensor:
    """Column 8 n + 4 h + w of a token takes half h of word w of the draw (n, token)."""
    counter = numpy.zeros((N, -(-D // 8), 4), dtype=numpy.uint64)
    counter[..., 0], counter[..., 1] = numpy.arange(counter.shape[1]), numpy.arange(N)[:, None]
    words = philox(int(seed), counter)
    levels = numpy.concatenate((words & numpy.uint64(0xFFFF), words >> numpy.uint64(16)), -1).reshape(N, -1)[:, :D]
    return torch.from_numpy(levels.astype(numpy.int64) >= dropped_levels(p)).to(seed.device)


def test_philox_is_the_published_one():
    """Random123's known answers for ten rounds, so that the numpy version is no copy of a mistake."""
    ones = numpy.full((1, 4), 0xFFFFFFFF)
    assert [hex(w) for w in philox(0, numpy.zeros((1, 4)), 10)[0]] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    assert [hex(w) for w in philox((1 << 64) - 1, ones, 10)[0]] == [
        "0x408f276d",
        "0x41c83b0e",
        "0xa20bc7c6",
        "0x6d5451fd",
    ]


def ones(N, D, p, seeds, device):
    """A group whose x is one and whose factors have one column each, of which the first is chosen."""
    G = len(seeds)
    index = torch.zeros(G, 1, 1, dtype=torch.int64, device=device)
    factors = Factors(torch.eye(D, device=device), torch.ones(D, 1, device=device), None, None, None)
    routing = Routing(index, index, torch.ones(G, 1, 1, device=device), None, None)
    options = Options(1, 1.0, p, "binary", None, True, False, torch.float32)
    x = torch.ones(N, D, device=device)
    return Group(x, [x[:, :1]] * G, [factors] * G, None, routing, seeds, Instances(1, N), options)


@pytest.mark.parametrize("N, D", [(1, 1), (21, 77), (40, 64)])
def test_the_mask(N, D, device):
    """Read off u, when x is one and each factor has one column; off dlora_A and dx, when du and the chosen factor are
    one. Each sibling has its own."""
    seeds, p = torch.tensor([(1 << 61) + 12345, 7], device=device), 0.4
    masks = [expected_mask(seed, N, D, p) for seed in seeds]
    group = ones(N, D, p, seeds, device)
    routing, saved = KERNELS.project(group)
    for u, mask in zip(saved[0], masks):
        assert torch.equal(u.sum(0), mask.float())
    du = torch.ones(2, N, 1, device=device)
    group = group._replace(factors=[own._replace(lora_A=torch.ones_like(own.lora_A)) for own in group.factors])
    needs = Needs(x=True, lora_A=True, lora_B=False, routers=False, gate=False)
    found = KERNELS.project_backward(group, None, routing, saved, (du, None, None), needs)
    assert torch.equal(found.x, sum(mask.float() for mask in masks))
    for dlora_A, mask in zip(found.lora_A, masks):
        assert torch.equal(dlora_A[0], mask.sum(0).float())


def test_the_layer_with_its_mask(monkeypatch, device):
    """The whole layer against the reference, which is given the mask of the kernels."""
    monkeypatch.setattr(reference, "keep_mask", lambda seed, x, p: expected_mask(seed, *x.shape, p))
    results = []
    for backend in ("triton", "reference"):
        layer = make_layer(40, 37, dtype=torch.float32, backend=backend, dropout=0.4).to(device)
        x = make_input(3, 21, 40, dtype=torch.float32).detach().to(device).requires_grad_()
        results.append(run(layer, x, mk.RoutingContext(mask=make_mask(3, 21).to(device))))
    assert_same(*results, CLOSE)


def test_the_routers_read_x_before_dropout(device):
    probabilities = []
    for dropout in (0.0, 0.9):
        layer = make_layer(40, 37, dtype=torch.float32, backend="triton", dropout=dropout).to(device)
        x = make_input(2, 21, 40, dtype=torch.float32).detach().to(device)
        probabilities.append(layer(x, return_routing=True)[1].probs_a)
    assert torch.equal(*probabilities)


def test_the_share_that_is_dropped(device):
    """Within five standard deviations of a binomial, over the whole and over every residue of the column modulo 8,
    since one draw serves eight elements."""
    N, D, p = 256, 64, 0.05
    _, saved = KERNELS.project(ones(N, D, p, torch.tensor([7], device=device), device))
    mask = saved[0][0].sum(0).double()
    deviation = (p * (1 - p)) ** 0.5
    for part in (mask, *(mask[:, i::8] for i in range(8))):
        assert abs(part.mean().item() - (1 - p)) < 5 * deviation / part.numel() ** 0.5
    assert relative_error(mask.mean() * keep_scale(p), torch.ones(())) < 5 * deviation / mask.numel() ** 0.5
