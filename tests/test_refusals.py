"""What is refused, in which words, and that a refused call changes nothing."""

import math
import re

import pytest
import torch
from torch import nn

import mixlora_kernels as mk

from .cases import TASK_DIM, make_input, make_layer

Context = mk.RoutingContext


@pytest.mark.parametrize("settings, message", [
    ({"r": 17}, "r must not exceed num_factors, got r=17 and num_factors=16"),
    ({"r": 0}, "r must be an integer of at least 1, got 0"),
    ({"r": 2.0}, "r must be an integer, got 2.0"),
    ({"r": True}, "r must be an integer, got True"),
    ({"num_factors": "16"}, "num_factors must be an integer, got '16'"),
    ({"alpha": math.nan}, "alpha must be a finite number or None, got nan"),
    ({"alpha": -math.inf}, "alpha must be a finite number or None, got -inf"),
    ({"alpha": 10**400}, "alpha must be a finite number or None, got 1000"),
    ({"alpha": "32"}, "alpha must be a finite number or None, got '32'"),
    ({"alpha": False}, "alpha must be a finite number or None, got False"),
    ({"dropout": "0.1"}, "dropout must be a finite number, got '0.1'"),
    ({"dropout": math.nan}, "dropout must be a finite number, got nan"),
    ({"dropout": None}, "dropout must be a finite number, got None"),
    ({"routing": ["task"]}, "routing must be one of 'instance', 'task', 'random', got ['task']"),
    ({"routing": "task", "task_dim": True}, "task_dim must be an integer or None, got True"),
    ({"routing": "task", "task_dim": 4.0}, "task_dim must be an integer or None, got 4.0"),
    ({"num_factors": -1}, "num_factors must be an integer of at least 1, got -1"),
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
    ({"routing": "token"}, "routing must be one of 'instance', 'task', 'random', got 'token'"),
    ({"conditioning": "all"}, "conditioning must be one of 'factors', 'none', 'published', 'tied', got 'all'"),
    ({"gate": "soft"}, "gate must be one of 'straight_through', 'binary', 'weighted', 'normalized', got 'soft'"),
    ({"pool": "mean"}, "pool must be one of 'sequence', 'prompt', 'text', 'all', got 'mean'"),
    ({"decode": "step"}, "decode must be one of 'prompt', 'token', got 'step'"),
    ({"routing": "task"}, "task_dim, the width of the task embedding, must be given with routing='task'"),
    ({"task_dim": 5}, "got routing='instance' and task_dim=5"),
    ({"routing": "task", "task_dim": 0}, "task_dim must be at least 1, got 0"),
    ({"routing": "random", "gate": "weighted"}, "gate='weighted' needs the routers' probabilities"),
], ids=str)  # fmt: skip
def test_configuration(settings, message):
    with pytest.raises(ValueError) as error:
        mk.MixLoRAConfig(**settings)
    assert message in str(error.value)


def f64(*shape):
    return torch.ones(shape, dtype=torch.float64)


def routing_of(B, r=3, E=7):
    index = torch.arange(r).expand(B, r)
    return mk.Routing(index, index, f64(B, r), f64(B, E), f64(B, E))


INPUTS = {
    "x of a wrong width": (f64(2, 6, 11), None, ValueError, "x must have the shape [B, L, 12] or [L, 12], got (2, 6, 11)"),
    "x of one dimension": (f64(12), None, ValueError, "x must have the shape [B, L, 12] or [L, 12], got (12,)"),
    "x of integers": (torch.ones(2, 6, 12, dtype=torch.int64), None, TypeError, "x must have a floating dtype, got torch.int64"),
    "x of another dtype": (torch.ones(2, 6, 12), None, TypeError, "x must have the base's dtype, torch.float64, got torch.float32"),
    "x on another device": (f64(2, 6, 12).to("meta"), None, ValueError, "x must be on the adapter's device, cpu, got meta"),
    "x without tokens": (f64(2, 0, 12), None, ValueError, "every instance needs a pooled token, got instances of length 0"),
    "mask of a wrong length": (f64(2, 6, 12), Context(mask=torch.ones(2, 5) > 0), ValueError, "mask must have the shape (2, 6) of x without d_in, got (2, 5)"),
    "mask of another batch": (f64(2, 6, 12), Context(mask=torch.ones(12) > 0), ValueError, "mask must have the shape (2, 6)"),
    "mask of floats": (f64(2, 6, 12), Context(mask=f64(2, 6)), TypeError, "mask must be bool or integer, got torch.float64"),
    "mask on another device": (f64(2, 6, 12), Context(mask=torch.ones(2, 6, device="meta") > 0), ValueError, "mask must be on the device of x, cpu, got meta"),
    "mask without a pooled token": (f64(3, 6, 12), Context(mask=torch.arange(3)[:, None].expand(3, 6) % 2), ValueError, "every instance needs a pooled token, got a mask with none for instances [0, 2]"),
    "cu_seqlens with a batch": (f64(2, 6, 12), Context(cu_seqlens=torch.tensor([0, 12])), ValueError, "cu_seqlens needs packed x, [N, d_in] or [1, N, d_in], got x of shape (2, 6, 12)"),
    "cu_seqlens too short": (f64(6, 12), Context(cu_seqlens=torch.tensor([0, 4])), ValueError, "cu_seqlens must rise from 0 to the 6 tokens of x, got [0, 4]"),
    "cu_seqlens not from 0": (f64(6, 12), Context(cu_seqlens=torch.tensor([1, 6])), ValueError, "cu_seqlens must rise from 0 to the 6 tokens of x, got [1, 6]"),
    "cu_seqlens with an empty instance": (f64(6, 12), Context(cu_seqlens=torch.tensor([0, 2, 2, 6])), ValueError, "cu_seqlens must rise from 0 to the 6 tokens of x, got [0, 2, 2, 6]"),
    "cu_seqlens of floats": (f64(6, 12), Context(cu_seqlens=f64(2)), TypeError, "cu_seqlens must be int32 or int64, got torch.float64"),
    "cu_seqlens of two dimensions": (f64(6, 12), Context(cu_seqlens=torch.tensor([[0, 6]])), ValueError, "cu_seqlens must have the shape [B + 1], got (1, 2)"),
    "packed mask without a pooled token": (f64(6, 12), Context(cu_seqlens=torch.tensor([0, 2, 6]), mask=torch.arange(6) < 2), ValueError, "a mask with none for instances [1]"),
    "routing of another batch": (f64(2, 6, 12), Context(routing=routing_of(3)), ValueError, "routing.index_a must have the shape [B, r] = (2, 3), got (3, 3)"),
    "routing of another r": (f64(2, 6, 12), Context(routing=routing_of(2, r=2)), ValueError, "routing.index_a must have the shape [B, r] = (2, 3), got (2, 2)"),
    "routing of another pool": (f64(2, 6, 12), Context(routing=routing_of(2, E=9)), ValueError, "routing.probs_a must have the shape [B, E] = (2, 7), got (2, 9)"),
    "routing with float indices": (f64(2, 6, 12), Context(routing=routing_of(2)._replace(index_b=f64(2, 3))), TypeError, "routing.index_b must be int64, got torch.float64"),
}  # fmt: skip

TASKS = {
    "no task": (None, None, ValueError, "routing='task' needs RoutingContext(task=...) of shape [B, 5] or [B, T, 5]"),
    "task of a wrong width": (f64(2, 4), None, ValueError, "task must have the shape [B, d_task] or [B, T, d_task] with B=2 and d_task=5, got (2, 4)"),
    "task of another batch": (f64(3, TASK_DIM), None, ValueError, "with B=2 and d_task=5, got (3, 5)"),
    "task of no tokens": (f64(2, 0, TASK_DIM), None, ValueError, "with B=2 and d_task=5, got (2, 0, 5)"),
    "task of integers": (torch.ones(2, TASK_DIM, dtype=torch.int64), None, TypeError, "task must have a floating dtype, got torch.int64"),
    "task_mask without tokens to mask": (f64(2, TASK_DIM), torch.ones(2, 1) > 0, ValueError, "task_mask must have the shape [B, T] of task [B, T, d_task], got (2, 1) and task (2, 5)"),
    "task_mask of a wrong length": (f64(2, 3, TASK_DIM), torch.ones(2, 4) > 0, ValueError, "got (2, 4) and task (2, 3, 5)"),
    "task_mask of nothing": (f64(2, 3, TASK_DIM), torch.zeros(2, 3) > 0, ValueError, "every instance needs a token of its task embedding"),
    "task_mask of floats": (f64(2, 3, TASK_DIM), f64(2, 3), TypeError, "task_mask must be bool or integer, got torch.float64"),
}  # fmt: skip


def refuse(layer, x, context, error, message):
    """The call fails with the message, and parameters, gradients, buffers and torch's generator are as before."""
    layer.adapter.lora_A.grad = torch.full_like(layer.adapter.lora_A, 3.0)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    state, x_before = torch.get_rng_state(), x if x.is_meta else x.clone()
    with pytest.raises(error) as raised:
        layer(x, context)
    assert message in str(raised.value)
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (layer.adapter.lora_A.grad == 3).all()
    assert all(p.grad is None for n, p in layer.named_parameters() if n != "adapter.lora_A")
    assert torch.equal(torch.get_rng_state(), state)
    assert x.is_meta or torch.equal(x, x_before)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", INPUTS)
def test_input(case, backend):
    refuse(make_layer(dropout=0.5, backend=backend), *INPUTS[case])


@pytest.mark.parametrize("case", TASKS)
def test_task(case):
    task, task_mask, error, message = TASKS[case]
    refuse(
        make_layer(routing="task", dropout=0.5), f64(2, 6, 12), Context(task=task, task_mask=task_mask), error, message
    )


@pytest.mark.parametrize("arguments, message", [
    (([[1.0] * 12] * 6,), "x must be a tensor, got list"),
    ((f64(2, 6, 12), torch.ones(2, 6) > 0), "context must be a RoutingContext or None, got Tensor"),
    ((f64(2, 6, 12), Context(mask=[[1] * 6] * 2)), "mask must be a tensor, got list"),
    ((f64(6, 12), Context(cu_seqlens=[0, 6])), "cu_seqlens must be a tensor, got list"),
])  # fmt: skip
def test_arguments_of_another_type(arguments, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        make_layer()(*arguments)


def test_a_configuration_that_is_none():
    with pytest.raises(TypeError, match=r"^config must be a MixLoRAConfig, got dict$"):
        mk.MixLoRALinear.from_linear(nn.Linear(12, 9), {"r": 4})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name, shape", [
    ("lora_A", (6, 12)), ("lora_B", (6, 9)), ("router_A", (7, 13)), ("router_B", (8, 12)), ("router_AB", (2, 7, 12)),
    ("router_A", None), ("router_B", None), ("router_AB", None),
])  # fmt: skip
def test_factors(name, shape, backend):
    layer = make_layer(backend=backend)
    factors = layer.adapter.factors
    wanted = tuple(getattr(factors, name).shape)
    wrong = factors._replace(**{name: None if shape is None else f64(*shape)})
    message = f"the configuration needs {name}, got None"
    if shape is not None:
        message = f"{name} must have the shape {wanted}, got {shape}"
    base = mk.FrozenLinear(layer.base_layer.weight, None)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mk.mixlora(f64(2, 6, 12), base, wrong, layer.config, backend=backend)


def test_factors_of_integers():
    layer = make_layer()
    wrong = layer.adapter.factors._replace(router_B=torch.ones(7, 12, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"^router_B must have a floating dtype, got torch\.int64$"):
        mk.mixlora(f64(2, 6, 12), mk.FrozenLinear(layer.base_layer.weight, None), wrong, layer.config)


def test_routers_that_a_given_routing_makes_needless():
    layer, x = make_layer(), make_input(2, 6, 12)
    y, routing = layer(x, return_routing=True)
    pools = mk.Factors(layer.adapter.lora_A, layer.adapter.lora_B, None, None, None)
    base = mk.FrozenLinear(layer.base_layer.weight, layer.base_layer.bias)
    again, _ = mk.mixlora(x, base, pools, layer.config, Context(routing=routing))
    assert torch.equal(again, y)


def test_a_configuration_that_was_changed():
    layer = make_layer()
    layer.config.r = 2
    with pytest.raises(ValueError, match=r"router_AB must have the shape \(2, 7, 12\), got \(3, 7, 12\)"):
        layer(f64(2, 6, 12))


def test_a_base_that_is_to_be_trained():
    """It would get no gradient."""
    layer = make_layer()
    weight = layer.base_layer.weight.detach().clone().requires_grad_()
    with pytest.raises(ValueError, match="the base's weight and bias must be frozen"):
        mk.mixlora(f64(2, 6, 12), mk.FrozenLinear(weight, None), layer.adapter.factors, layer.config)


def test_an_output_of_integers():
    layer = make_layer()
    y = torch.ones(2, 6, 9, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"the base's output must have a floating dtype, got torch\.int64"):
        mk.mixlora(f64(2, 6, 12), y, layer.adapter.factors, layer.config)


@pytest.mark.parametrize("conditioning", ["factors", "tied"])
def test_a_second_derivative(conditioning):
    """What the stages keep for the backward has no graph of its own."""
    layer, x = make_layer(conditioning=conditioning, backend="torch"), make_input(2, 6, 12)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_a_base_that_is_no_module_or_has_no_known_size():
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Module, got Tensor"):
        mk.MixLoRALinear.from_linear(torch.ones(3, 3))
    with pytest.raises(ValueError, match="Identity has no attribute in_features: pass in_features to from_linear"):
        mk.MixLoRALinear.from_linear(nn.Identity())


def test_a_base_of_another_size():
    layer = mk.MixLoRALinear.from_linear(nn.Linear(12, 8), in_features=12, out_features=9)
    with pytest.raises(ValueError, match=r"the base's weight must have the shape \(9, 12\), got \(8, 12\)"):
        layer(torch.ones(2, 6, 12))
    layer = mk.MixLoRALinear.from_linear(nn.Sequential(nn.Linear(12, 8)), in_features=12, out_features=9)
    with pytest.raises(ValueError, match=r"the base must map x to the shape \(2, 6, 9\), got \(2, 6, 8\)"):
        layer(torch.ones(2, 6, 12))


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of 'reference', 'torch', 'triton' or None, got 'cuda'"):
        mk.MixLoRALinear(12, 9, backend="cuda")
