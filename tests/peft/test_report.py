"""The report of the last forward's routing."""

import math
import warnings

import pytest
import torch

from mixlora_kernels.peft import plot_routing, routing_report
from mixlora_kernels.peft.recorded import Recorded
from mixlora_kernels.peft.report import NEAR
from mixlora_kernels.routing import Routing

from .models import adapt, build, pad, prompts


def test_the_report_counts_what_was_chosen():
    model = adapt(build())
    ids, mask = pad(prompts(3), "right")
    model(input_ids=ids, attention_mask=mask)
    report = model.routing_report()["default"]
    assert len(report) == 14
    key = "model.layers.0.self_attn.q_proj"
    layer = model.base_model.model.get_submodule(key)
    x = model.base_model.model.model.layers[0].input_layernorm(model.get_input_embeddings()(ids))
    means = torch.stack([row[real.bool()].mean(0) for row, real in zip(x, mask)])
    adapter = layer.mixlora_adapter["default"]
    p = (means @ adapter.router_A.T).softmax(-1)
    assert report[key]["usage_a"] == torch.bincount(p.topk(2)[1].flatten(), minlength=6).tolist()
    assert report[key]["instances"] == 3
    assert sum(report[key]["usage_b"]) == 6
    entropy = -(p * p.log()).sum(-1).mean().item()
    assert report[key]["entropy_a"] == pytest.approx(entropy, rel=1e-5)
    assert 0 < report[key]["entropy_b"] <= math.log(6)


@pytest.mark.parametrize("instances, same, warned", [(16, 16, True), (16, 8, False), (15, 15, False)])
def test_collapse_is_warned_of(instances, same, warned):
    """Of 16 instances all, or half, chose factors 0 and 1; the others 2 and 3."""
    model = adapt(build())
    model(input_ids=prompts(1)[0][None])
    side = model.base_model.side
    index = torch.tensor([[0, 1]] * same + [[2, 3]] * (instances - same))
    probs = torch.full((instances, 6), 1 / 6)
    routing = Routing(index, index, torch.ones(instances, 2), probs, probs)
    side._last = {place: Recorded(routing.unsqueeze(), 0) for place in side.last}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = routing_report(model)["default"]
    messages = [str(one.message) for one in caught if "collapsed" in str(one.message)]
    assert len(messages) == warned
    assert all("'default'" in message and "and 25 more" in message for message in messages)
    assert all(row["most_used_a"] == (same / instances if same > 8 else 0.5) for row in report.values())


@pytest.mark.parametrize("gap, ties", [(0.5 * NEAR, 1.0), (2 * NEAR, 0.0)])
def test_near_ties_at_the_border_of_the_chosen(gap, ties):
    model = adapt(build())
    ids = prompts(1)[0][None]
    model(input_ids=ids)
    side = model.base_model.side
    probs = torch.tensor([[0.3, 0.2, 0.2 * (1 - gap), 0.1, 0.1, 0.1]])
    side._last = {
        place: Recorded(routing._replace(probs_a=probs).unsqueeze(), 0) for place, routing in side.last.items()
    }
    report = routing_report(model)["default"]
    assert all(row["near_ties_a"] == ties for row in report.values())


def test_no_border_without_a_choice():
    model = adapt(build(), r=3, num_factors=3)
    model(input_ids=prompts(1)[0][None])
    assert all(row["near_ties_a"] == 0 for row in model.routing_report()["default"].values())


def test_it_holds_no_graph():
    model = adapt(build()).train()
    model(input_ids=prompts(1)[0][None])
    assert not any(tensor.requires_grad for routing in model.base_model.side.last.values() for tensor in routing)


def test_the_plot(tmp_path):
    model = adapt(build())
    model(input_ids=prompts(1)[0][None])
    figure = plot_routing(model.routing_report())
    assert len(figure.axes) == 3
    figure.savefig(tmp_path / "routing.png")
    with pytest.raises(KeyError):
        plot_routing(model.routing_report(), adapter="other")
