"""Models that classify: an instance's score is that of this instance alone."""

import pytest
import torch
import transformers as hf

from .models import TEXT, adapt, gradients, pad, prompts, relative

TOLERANCE = 1e-11  # in float64, sums in another order
HEADS = {
    "SEQ_CLS": (hf.LlamaForSequenceClassification, hf.BertForSequenceClassification),
    "TOKEN_CLS": (hf.LlamaForTokenClassification, hf.BertForTokenClassification),
}
SIZES = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}


@pytest.mark.parametrize("kind, cls", [(kind, cls) for kind, classes in HEADS.items() for cls in classes])
def test_in_a_padded_batch(kind, cls):
    torch.manual_seed(0)
    base = cls(cls.config_class(**SIZES, num_labels=3)).eval()
    model = adapt(base, task_type=kind).double()  # dropout off: of a head it is no business of the adapter
    instances = prompts(3)
    ids, mask = pad(instances, "right")
    labels = torch.tensor([0, 1, 2]) if kind == "SEQ_CLS" else ids % 3
    expected = []
    for row, tokens in enumerate(instances):
        of_one = labels[row : row + 1] if kind == "SEQ_CLS" else labels[row : row + 1, : len(tokens)]
        output = model(input_ids=tokens[None], attention_mask=torch.ones(1, len(tokens)), labels=of_one)
        (output.loss * of_one.numel()).backward()
        expected.append(output.logits[0].detach())
    wanted = gradients(model)
    if kind == "TOKEN_CLS":
        labels = labels.masked_fill(mask == 0, -100)
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    (output.loss * (labels != -100).sum()).backward()
    for found, one in zip(output.logits, expected):
        assert relative(found if kind == "SEQ_CLS" else found[: len(one)], one) < TOLERANCE
    scale = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in gradients(model).items():
        assert (gradient - wanted[name]).abs().max() < TOLERANCE * scale, name
