"""Quantised frozen layers: the adapted model against the same on the dequantised weights."""

import copy

import pytest
import torch
from torch import nn

from .models import adapt, build, gradients, pad, prompts, relative

# Both models take the same products of the same float32 numbers, in kernels that sum in other orders.
TOLERANCE = 1e-5


def bitsandbytes_4bit(linear: nn.Linear):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    layer = layer.to("cpu")
    return layer, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def bitsandbytes_8bit(linear: nn.Linear):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    return layer, bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)


def torchao_int8(linear: nn.Linear):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    layer = nn.Sequential(copy.deepcopy(linear))
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer[0], layer[0].weight.dequantize()


def quantise(model: nn.Module, how) -> tuple[nn.Module, nn.Module]:
    quantised, dequantised = copy.deepcopy(model), copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            parent, _, child = name.rpartition(".")
            layer, weight = how(module)
            setattr(quantised.get_submodule(parent), child, layer)
            dequantised.get_submodule(name).weight.data = weight.detach().clone().to(torch.float32)
    return quantised, dequantised


@pytest.mark.parametrize("how", [bitsandbytes_4bit, bitsandbytes_8bit, torchao_int8])
def test_forward_and_backward(how):
    ids, mask = pad(prompts(3), "right")
    found = []
    quantised, dequantised = quantise(build(), how)
    place = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(dequantised.get_submodule(place).weight, build().get_submodule(place).weight)
    for model in (quantised, dequantised):
        model = adapt(model, alpha=4).train()
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        logits.log_softmax(-1)[:, 5].sum().backward()
        found.append((logits.detach(), gradients(model)))
    (logits, gradient), (expected, wanted) = found
    assert relative(logits, expected) < TOLERANCE
    scale = max(value.abs().max() for value in wanted.values())
    assert all((gradient[name] - value).abs().max() < TOLERANCE * scale for name, value in wanted.items())
