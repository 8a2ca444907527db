"""The frozen product's share in x's gradient, in blocks of float32 where that is faster."""

import pytest
import torch
from torch import nn

import mixlora_kernels as mk
from mixlora_kernels import frozen


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_the_product_has_the_bits_of_a_linear_layer_under_autocast(weight_dtype, bias_dtype):
    """Whatever the dtypes of weight and bias, each on its own."""
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 30), torch.randn(7, 40)
    linear.weight.data, linear.bias.data = linear.weight.data.to(weight_dtype), linear.bias.data.to(bias_dtype)
    layer = mk.MixLoRALinear.from_linear(linear)
    with torch.autocast("cpu", torch.bfloat16):
        expected = linear(x)
        assert torch.equal(layer(x), expected)
    onto = torch.ones(7, 30, dtype=torch.bfloat16)
    frozen.frozen_product(x.bfloat16(), linear.weight, linear.bias, onto=onto)
    # Three sums of up to 4 are rounded, by at most 2^-8 of each: the product onto 1, with the bias, and ``expected``.
    assert (onto - 1 - expected).abs().max() <= 3 * 4 * 2**-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 5, 3), (frozen.BLOCK_N + 7, 40, 2 * frozen.BLOCK_D + 9)])
def test_blocks_round_once(monkeypatch, dtype, shape):
    """Within half a unit in the last place of the exact product, and float32's own rounding."""
    monkeypatch.setattr(frozen, "single_is_faster", lambda dtype: True)
    (N, O, D), generator = shape, torch.Generator().manual_seed(0)
    dy, weight = (torch.randn(s, generator=generator).to(dtype) for s in ((N, O), (O, D)))
    exact = dy.double() @ weight.double()
    actual = frozen.frozen_product_backward(dy, weight)
    half_a_unit = torch.finfo(dtype).eps / 2
    assert actual.dtype == dtype
    # 1e-5 of the terms' sizes: float32 sums of 40 terms, where they cancel.
    assert (
        (actual.double() - exact).abs()
        <= half_a_unit * exact.abs() + 1e-5 * (dy.double().abs() @ weight.double().abs())
    ).all()


def test_the_choice_is_made_once_and_float32_is_left_alone(monkeypatch):
    frozen.single_is_faster.cache_clear()
    assert frozen.single_is_faster(torch.bfloat16) is frozen.single_is_faster(torch.bfloat16)
    assert frozen.single_is_faster.cache_info().misses == 1
    monkeypatch.setattr(frozen, "single_is_faster", lambda dtype: pytest.fail("asked for float32"))
    dy, weight = torch.randn(3, 4), torch.randn(4, 5)
    assert torch.equal(frozen.frozen_product_backward(dy, weight), dy @ weight)
