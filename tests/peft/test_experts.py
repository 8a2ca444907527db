"""Mixtures of experts: what is adapted, what is left alone and named, and that the result is right."""

import warnings

import pytest
import torch
import transformers as hf
from torch import nn

from mixlora_kernels.peft import ConditionalMixLoRAConfig, MixLoRALayer
from mixlora_kernels.peft.linears import is_linear

from .models import TEXT, adapt, gradients, pad, prompts, relative

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"{name}_proj" for name in ("gate", "up", "down")}


def qwen3_moe():
    config = hf.Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    return hf.Qwen3MoeForCausalLM(config)


def mixtral():
    return hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2))


def llama4():
    """Its first layer is dense; the second has experts, a router and a shared expert."""
    options = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**TEXT, **options, interleave_moe_layer_step=2))


MODELS = {
    qwen3_moe: ({(layer, name) for layer in "01" for name in ATTENTION}, ["0.mlp.experts", "1.mlp.experts"]),
    mixtral: ({(layer, name) for layer in "01" for name in ATTENTION}, ["0.mlp.experts", "1.mlp.experts"]),
    llama4: (
        {(layer, name) for layer in "01" for name in ATTENTION}
        | {("0", f"feed_forward.{name}") for name in MLP}
        | {("1", f"feed_forward.shared_expert.{name}") for name in MLP},
        ["1.feed_forward.experts"],
    ),
}


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("build", MODELS)
def test_what_is_adapted_and_what_is_named(build, targets):
    torch.manual_seed(0)
    expected, experts = MODELS[build]
    with pytest.warns(UserWarning, match="mixtures of experts") as warned:
        model = adapt(build().eval(), target_modules=targets)
    layers = {
        tuple(name.rpartition("layers.")[2].split(".", 1)): module
        for name, module in model.named_modules()
        if isinstance(module, MixLoRALayer)
    }
    assert layers.keys() == expected
    naming = [str(entry.message) for entry in warned if "mixtures of experts" in str(entry.message)]
    assert len(naming) == 1 and experts[-1].partition(".")[2] in naming[0]
    model(input_ids=prompts(1)[0][None])
    report = model.routing_report()
    assert list(report.left_alone) == [f"model.layers.{name}" for name in experts]
    assert all("gate_up_proj [4, " in what for what in report.left_alone.values())
    assert len(report["default"]) == len(expected)


@pytest.mark.parametrize("build", MODELS)
def test_padding_and_neighbours_change_nothing(build):
    torch.manual_seed(0)
    model = adapt(build().eval())
    instances = prompts(3)
    ids, mask = pad(instances, "right")
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        for row, tokens in enumerate(instances):
            alone = model(input_ids=tokens[None]).logits[0]
            # float32: products of other shapes, summed in another order; measured 5e-7.
            assert relative(together[row, : len(tokens)], alone) < 1e-5
            with model.disable_adapter():
                assert relative(alone, model(input_ids=tokens[None]).logits[0]) > 1e-2  # the adapter shows


@pytest.mark.parametrize("build", MODELS)
def test_training_reaches_every_adapter(build):
    torch.manual_seed(0)
    model = adapt(build()).train()
    ids = prompts(1)[0][None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients(model).items() if "lora_" in name)


def test_a_router_asked_for_by_name_is_refused():
    with pytest.raises(ValueError, match=r"feed_forward\.router is not supported: .* got Llama4Router"):
        adapt(llama4(), target_modules=["router"])


class Mixture(nn.Module):
    """Experts as modules of their own, sent to by a plain linear layer."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 3, bias=False)
        self.shared = nn.Linear(32, 32)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        return self.shared(x) + sum(
            weight.unsqueeze(-1) * expert(x)
            for weight, expert in zip(self.gate(x).softmax(-1).unbind(-1), self.experts)
        )


def test_experts_that_are_modules_and_a_router_that_is_a_plain_linear_layer():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    for layer in model.model.layers:
        layer.mlp = Mixture()
    with pytest.warns(UserWarning, match="3 separate experts"):
        adapted = adapt(model)
    names = {name.rpartition("layers.")[2] for name in adapted.targeted_module_names}
    assert names == {f"{layer}.{name}" for layer in "01" for name in ATTENTION | {"mlp.shared"}}


def test_no_warning_without_experts():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*mixtures of experts")
        model = adapt(hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)))
        model.add_adapter("second", ConditionalMixLoRAConfig(r=1, num_factors=2, task_type="CAUSAL_LM"))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Grouped(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(*x.shape[:-2], 2, -1))


class QuantLinear(nn.Module):
    """As of GPTQ."""

    infeatures, outfeatures = 4, 5


@pytest.mark.parametrize(
    "module, linear",
    [
        (nn.Linear(4, 5), True),
        (Scaled(4, 5), True),
        (Pair(4, 5), False),
        (Grouped(4, 5), False),
        (QuantLinear(), True),
        (nn.Bilinear(4, 4, 5), False),
        (nn.Embedding(4, 5), False),
        (nn.Conv1d(4, 5, 1), False),
    ],
)
def test_what_is_linear(module, linear):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    assert is_linear(module) is linear
    assert torch.equal(torch.get_rng_state(), state)  # a forward that is tried out computes nothing
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
