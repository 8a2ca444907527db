"""``SideInformation.groups_siblings``: whether layers that read the same x are computed together."""

import torch

from mixlora_kernels.peft import siblings
from mixlora_kernels.peft.side_information import find_side_information

from .models import adapt, build


def test_each_layer_by_itself_has_the_same_bits(monkeypatch):
    groups, together = [], siblings.mixlora_siblings

    def count(x, bases, *arguments, **options):
        groups.append(len(bases))
        return together(x, bases, *arguments, **options)

    monkeypatch.setattr(siblings, "mixlora_siblings", count)
    model = adapt(build("llama")).eval()
    tokens = torch.arange(24).view(2, 12) % 7 + 3
    with torch.no_grad():
        model(input_ids=tokens)  # the first forward observes who reads the same x
        shared = model(input_ids=tokens).logits
        assert set(groups) == {2, 3}
        groups.clear()
        find_side_information(model).groups_siblings = False
        assert torch.equal(model(input_ids=tokens).logits, shared)
    assert groups == []
