"""pool="prompt": training routes as generation does, under every trainer.

An answer's log-probabilities in a trainer's forward are those of decoding it token by token behind its prompt.
"""

import warnings

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

from mixlora_kernels import MixLoRAConfig
from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_kernels.peft.tokens import prompt_mask

from .models import adapt, build, pad, prompts, relative

# The promise. In float32 the two differ by rounding, 1e-6; a routing that pools the answer is off by 1e-1 and more
# (see test_the_sequence_would_show).
TOLERANCE = 1e-4
ENDS = (4, 3, 5)  # tokens of each instance's prompt


def decoded(model, prompt: torch.Tensor, answer: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The answer's log-probabilities [tokens], each token decoded through the cache."""
    training = model.training
    model.eval()
    found = []
    with torch.no_grad():
        out = model(input_ids=prompt[None], use_cache=True)
        for token in answer:
            logits = out.logits[0, -1].float() / temperature
            found.append(logits.log_softmax(-1)[token])
            cache = out.get("cache") if "cache" in out else out.past_key_values
            out = model(input_ids=token[None, None], past_key_values=cache, use_cache=True)
    model.train(training)
    return torch.stack(found)


def log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[B, L - 1]: of each token but the first."""
    return logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def labelled(instances, ends=ENDS):
    ids, mask = pad(instances, "right", value=7)
    labels = ids.masked_fill(mask == 0, -100)
    for row, end in zip(labels, ends):
        row[:end] = -100
    return ids, mask, labels


def distance(model, logits, ids, instances, ends=ENDS) -> float:
    found = log_probs(logits, ids)
    return max(
        (found[row, end - 1 : len(tokens) - 1] - decoded(model, tokens[:end], tokens[end:])).abs().max().item()
        for row, (tokens, end) in enumerate(zip(instances, ends))
    )


def test_it_is_the_default_of_whole_models():
    assert ConditionalMixLoRAConfig().pool == "prompt"
    assert MixLoRAConfig().pool == "sequence"  # the paper's
    assert ConditionalMixLoRAConfig.published().pool == "all"


def test_a_training_forward_with_labels():
    model, instances = adapt(build()).train(), prompts(3)
    ids, mask, labels = labelled(instances)
    logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    assert distance(model, logits, ids, instances) < TOLERANCE


def test_the_sequence_would_show():
    model, instances = adapt(build(), pool="sequence").train(), prompts(3)
    ids, mask, labels = labelled(instances)
    logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    assert distance(model, logits, ids, instances) > 1e-1


def test_a_scoring_forward_that_keeps_the_answers_logits():
    """Prompts padded on the left, answers on the right, no labels: as preference trainers score them."""
    model = adapt(build()).train()
    instances, answer = prompts(2, lengths=(7, 4)), prompts(2, lengths=(3, 2), seed=8)
    ids, mask = (torch.cat(both, 1) for both in zip(pad(instances, "left"), pad(answer, "right")))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=4, use_cache=False
        ).logits  # fmt: skip
    for row, (prompt, tokens) in enumerate(zip(instances, answer)):
        found = logits[row, : len(tokens)].log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        assert (found - decoded(model, prompt, tokens)).abs().max() < TOLERANCE


@pytest.mark.parametrize("first", [True, False], ids=["first-labelled", "first-ignored"])
def test_labels_that_leave_no_prompt(first):
    """Row by row: an answer from the second token on is routed by its whole sequence, its neighbour by its prompt."""
    instances = prompts(3)
    ids, mask, labels = labelled(instances, ends=(1, 3, 1))
    if first:
        labels[0, 0], labels[2, 0] = ids[0, 0], ids[2, 0]
    whole = adapt(build(), pool="sequence").train()(input_ids=ids, attention_mask=mask).logits
    model = adapt(build()).train()
    logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    for row in (0, 2):
        real = mask[row].bool()
        assert relative(logits[row][real], whole[row][real]) < 1e-6  # the same sums
    assert relative(logits[1], whole[1]) > 1e-2
    # The same packed, as a collator marks it: the first token of each instance without a label.
    packed = {
        "input_ids": torch.cat(instances)[None],
        "position_ids": torch.cat([torch.arange(len(tokens)) for tokens in instances])[None],
        "labels": torch.cat([row[real.bool()] for row, real in zip(labels, mask)])[None],
    }
    found = model(**packed, use_cache=False).logits[0].split([len(tokens) for tokens in instances])
    for row, real, other in zip(logits, mask, found):
        assert relative(other, row[real.bool()]) < 1e-5  # sums of other lengths


def test_prompt_masks():
    labels = torch.tensor([[-100, -100, 5, 6, -100, 7, -100, -100, -100, 8, 9, -100]])
    starts = torch.tensor([[1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1]]).bool()
    expected = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1]]).bool()
    assert torch.equal(prompt_mask(labels, None, starts), expected)
    # Padding is no prompt: of the second row one token is left of it, of the third none has a label.
    labels = torch.tensor([[-100, -100, -100, 5], [-100, -100, -100, 5], [-100, -100, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]).bool()
    expected = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1]]).bool()
    assert torch.equal(prompt_mask(labels, mask, None), expected)


def test_a_training_forward_that_tells_no_prompt():
    ids, mask, _ = labelled(prompts(3))
    whole = adapt(build(), pool="sequence").train()(input_ids=ids, attention_mask=mask).logits
    with pytest.warns(UserWarning, match="came without labels"):
        logits = adapt(build()).train()(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(logits, whole)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 0]), torch.tensor([[-100] * 4 + [1] * 5] * 3)])
def test_a_classifiers_labels_are_no_answers(labels):
    """Of the instance, or of its tokens: without them, at inference, the whole sequence is pooled as well."""
    torch.manual_seed(0)
    kind, task = (
        (transformers.LlamaForSequenceClassification, "SEQ_CLS")
        if labels.dim() == 1
        else (transformers.LlamaForTokenClassification, "TOKEN_CLS")
    )
    base = kind(transformers.LlamaConfig(**build().config.to_diff_dict() | {"num_labels": 2})).eval()
    model = adapt(base, task_type=task)
    ids, mask, _ = labelled(prompts(3))
    logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    assert torch.equal(logits, model(input_ids=ids, attention_mask=mask).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is generated, and so nothing to be warned of
        model.train()(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_a_decoder_behind_an_encoder(kind):
    """The encoder's tokens are all prompt; the decoder's is what it begins with, as when it generates."""
    from .test_encoder_decoder import _bart, _t5

    torch.manual_seed(0)
    base = {"T5": _t5, "Bart": _bart}[kind]().eval()
    linear = r".*\.(q|k|v|o|wi|wo|[qkv]_proj|out_proj|fc1|fc2)"
    model = adapt(base, task_type="SEQ_2_SEQ_LM", target_modules=linear).train()
    texts, answers = prompts(3, lengths=(9, 6, 7)), prompts(3, lengths=(4, 9, 2), seed=8)
    ids, mask = pad(texts, "right", value=7)
    labels, _ = pad(answers, "right", value=-100)
    logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    model.eval()
    for row, (text, answer) in enumerate(zip(texts, answers)):
        found = logits[row, : len(answer)].log_softmax(-1).gather(-1, answer[:, None])[:, 0]
        steps = []
        encoded = model.get_encoder()(text[None])
        tokens, cache = torch.tensor([[1]]), None
        for token in answer:
            out = model(
                encoder_outputs=encoded, decoder_input_ids=tokens, past_key_values=cache, use_cache=True
            )  # fmt: skip
            cache = out.get("cache") if "cache" in out else out.past_key_values
            steps.append(out.logits[0, -1].log_softmax(-1)[token])
            tokens = token[None, None]
        assert (found - torch.stack(steps)).abs().max() < TOLERANCE


def test_trainer(tmp_path):
    model, instances = adapt(build()), prompts(3)
    ids, mask, labels = labelled(instances)
    rows = [{"input_ids": i, "attention_mask": m, "labels": x} for i, m, x in zip(ids, mask, labels)]
    seen = []

    class Noting(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, **{**kwargs, "return_outputs": True})
            seen.append(distance(model, outputs.logits.detach(), ids, instances))
            return loss

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    Noting(model, args, train_dataset=rows).train()
    assert len(seen) == 2 and max(seen) < TOLERANCE
