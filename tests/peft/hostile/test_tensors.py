"""Tensors that an adapter does not have, or not in that shape, dtype or range."""

import pytest
import torch
from peft import PeftConfig

from ..models import adapt, build, needs_transformers_adapters
from .adapters import MODEL, QUERY, WAYS, assert_same, check_refused, everything, load_by, query, rewrite, weights_of

A = torch.randn(6, 32)
TENSORS = {
    "a frozen weight": ({f"{MODEL}.embed_tokens.weight": torch.zeros(96, 32)}, "unknown keys: .*embed_tokens"),
    "a frozen weight inside of an adapted layer": (
        {f"{MODEL}.layers.0.self_attn.q_proj.base_layer.weight": torch.zeros(32, 32)}, "unknown keys: .*base_layer"
    ),
    "the head": ({"base_model.model.lm_head.weight": torch.zeros(96, 32)}, r"unknown keys: .*lm_head\.weight"),
    "a tensor of nobody": ({"x": torch.zeros(1)}, "unknown keys: .*['\"]x"),
    "a layer that is not there": ({QUERY.replace("layers.0", "layers.9") + ".lora_A": A}, r"unknown keys: .*layers\.9"),
    "another adapter's name in the key": ({f"{QUERY}.second.lora_A": A.clone()}, r"unknown keys: .*second\.lora_A"),
    "a missing tensor": (query(lora_A=None), r"missing keys: .*q_proj\.mixlora_adapter\.(default\.)?lora_A"),
    "a shape transposed": (query(lora_A=A.T.contiguous()), r"other shapes: .*\(32, 6\) in the file, \(6, 32\)"),
    "a scalar": (query(lora_A=torch.tensor(1.0)), r"other shapes: .*\(\) in the file"),
    "an empty tensor": (query(lora_A=torch.empty(0, 32)), r"other shapes: .*\(0, 32\) in the file"),
    "integers": (query(lora_A=A.long()), "other dtypes: .*lora_A: (I64|int64)"),
    "bools": (query(lora_A=A > 0), "other dtypes: .*lora_A: (BOOL|bool)"),
    "float8": (query(lora_A=A.to(torch.float8_e4m3fn)), "other dtypes: .*lora_A: (F8_E4M3|float8_e4m3fn)"),
    "complex": (query(lora_A=A.to(torch.complex64)), "other dtypes: .*lora_A: (C64|complex64)"),
    "one NaN": (query(lora_A=A.index_fill(0, torch.tensor(5), float("nan"))), "Not finite: .*q_proj.*lora_A"),
    "one infinity": (query(router_AB=torch.full((2, 6, 32), float("inf"))), "Not finite: .*q_proj.*router_AB"),
    "finite in float64 alone": (query(lora_B=torch.full((6, 32), 1e300, dtype=torch.float64)), "Not finite: .*lora_B"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(folder, case):
    changed, message = TENSORS[case]
    rewrite(folder, **changed)
    check_refused(folder, ValueError, message)


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_into_an_adapter_that_is_there(folder, case):
    changed, message = TENSORS[case]
    rewrite(folder, **changed)
    model = adapt(build(), target_modules=["q_proj"])
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, "default")
    assert_same(model, before)


@needs_transformers_adapters
@pytest.mark.parametrize("case", TENSORS)
def test_tensors_without_a_file(good, case):
    """transformers' own loading takes tensors, too."""
    changed, message = TENSORS[case]
    weights = {key: value for key, value in (weights_of(good) | changed).items() if value is not None}
    model = build()
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(peft_config=PeftConfig.from_pretrained(good), adapter_state_dict=weights)
    assert_same(model, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floating_dtypes_load(folder, dtype):
    rewrite(folder, **{key: value.to(dtype) for key, value in weights_of(folder).items()})
    for way in WAYS:
        load_by(way, folder)[1]()
