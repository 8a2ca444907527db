"""Which layers are adapted: the linear ones of the decoder, or those that are named."""

import re

import pytest
import torch
from peft import get_peft_model
from torch import nn

from mixlora_kernels.peft import ConditionalMixLoRAConfig

from .models import FAMILIES, adapt, build, gradients
from .test_method import layers_of


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_are_the_linear_layers_of_the_decoder(family):
    model = build(family)
    decoder = model.get_submodule(FAMILIES[family].decoder)
    expected = {
        f"{FAMILIES[family].decoder}.{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("layers.")
    }
    assert len(expected) == 14  # seven in each of two layers
    adapted = adapt(model)
    assert {layer.key for layer in layers_of(adapted).values()} == expected
    adapted.add_adapter("second", ConditionalMixLoRAConfig(r=1, num_factors=3, task_type="CAUSAL_LM"))
    assert all(layer.mixlora_adapter.keys() == {"default", "second"} for layer in layers_of(adapted).values())


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_default_targets_in_some_layers(family):
    adapted = adapt(build(family), layers_to_transform=[1], exclude_modules=["gate_proj"])
    keys = [layer.key for layer in layers_of(adapted).values()]
    assert len(keys) == 6
    assert all(".layers.1." in key and "gate_proj" not in key for key in keys)


def test_default_targets_of_an_encoder():
    import transformers as hf

    config = hf.BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    adapted = adapt(hf.BertForSequenceClassification(config), task_type="SEQ_CLS", layers_to_transform=[1])
    keys = [layer.key for layer in layers_of(adapted).values()]
    assert len(keys) == 6 and all(key.startswith("bert.encoder.layer.1.") for key in keys)


def test_layers_to_transform_with_names():
    adapted = adapt(build(), target_modules=["q_proj", "down_proj"], layers_to_transform=[0], layers_pattern="layers")
    keys = {layer.key for layer in layers_of(adapted).values()}
    assert keys == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"}


def test_names_that_are_endings_of_one_another():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.other_lin = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.other_lin(self.lin(x))

    adapted = get_peft_model(Model(), ConditionalMixLoRAConfig(r=1, num_factors=2, target_modules=["lin"]))
    assert [layer.key for layer in layers_of(adapted).values()] == ["lin"]


def test_all_linear_leaves_the_head():
    adapted = adapt(build(), target_modules="all-linear")
    assert len(layers_of(adapted)) == 14


class Encoder(nn.Module):
    """Torch's encoder, whose attention and layers read the weights of their linear layers themselves."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.inputs, self.encoder = nn.Linear(8, 8), nn.TransformerEncoder(layer, 1)

    def forward(self, x):
        return self.encoder(self.inputs(x))


@pytest.mark.parametrize(
    "target, reader",
    [
        ("encoder.layers.0.linear1", "TransformerEncoderLayer"),
        ("encoder.layers.0.linear2", "TransformerEncoderLayer"),
        ("encoder.layers.0.self_attn.out_proj", "MultiheadAttention"),
    ],
)
def test_layers_whose_weights_are_read_past_them_are_refused(target, reader):
    ending = target.rpartition(".")[2]
    message = rf"{re.escape(target)} is not supported: {reader} reads its weight and does not call it.*exclude_modules"
    with pytest.raises(ValueError, match=message):
        get_peft_model(Encoder(), ConditionalMixLoRAConfig(r=1, num_factors=2, target_modules=["inputs", ending]))
    settings = {"target_modules": ["inputs", ending], "exclude_modules": [target]}
    adapted = get_peft_model(Encoder(), ConditionalMixLoRAConfig(r=1, num_factors=2, **settings))
    assert [layer.key for layer in layers_of(adapted).values()] == ["inputs"]


def test_all_linear_leaves_layers_whose_weights_are_read_past_them():
    config = ConditionalMixLoRAConfig(r=1, num_factors=2, target_modules="all-linear", init_weights=False)
    adapted = get_peft_model(Encoder(), config)
    assert [layer.key for layer in layers_of(adapted).values()] == ["inputs"]
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        slow, fast = adapted.train()(x), adapted.eval()(x)
    assert torch.allclose(fast, slow, atol=1e-5)  # float32, and torch's fast path sums in another order


def test_all_linear_of_siglip_trains_every_parameter():
    """Its head pools with torch's attention."""
    import transformers as hf

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**sizes, image_size=8, patch_size=4))
    adapted = adapt(model, target_modules="all-linear", task_type=None)
    keys = {layer.key.removeprefix("vision_model.") for layer in layers_of(adapted).values()}
    attention = {f"encoder.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert keys == attention | {f"{place}.mlp.fc{i}" for place in ("encoder.layers.0", "head") for i in (1, 2)}
    adapted.train()(pixel_values=torch.randn(2, 3, 8, 8)).pooler_output.sum().backward()
    gradients(adapted)
