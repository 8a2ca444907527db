"""Models of an encoder and a decoder: each layer pools the tokens it sees, of the one or of the other."""

import pytest
import torch
import transformers as hf

from . import models
from .models import gradients, pad, prompts, relative
from .test_exact_training import TOLERANCE, answer_of, check

SIZES = {"vocab_size": 96, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2}


def _t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**SIZES, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0)
    )


def _bart():
    layers = {f"{part}_layers": 2 for part in ("encoder", "decoder")}
    sizes = {
        f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("ffn_dim", 48), ("attention_heads", 4))
    }
    return hf.BartForConditionalGeneration(
        hf.BartConfig(**SIZES, **layers, **sizes, max_position_embeddings=64, dropout=0.0)
    )


@pytest.fixture(params=[_t5, _bart], ids=["t5", "bart"])
def model(request):
    torch.manual_seed(0)
    base = request.param().eval()
    linear = r".*\.(q|k|v|o|wi|wo|[qkv]_proj|out_proj|fc1|fc2)"
    return models.adapt(base, task_type="SEQ_2_SEQ_LM", target_modules=linear).double()


# Lengths of the instances' texts and answers; one answer is as long as the longest text.
TEXTS, ANSWERS = (9, 6, 7), (4, 9, 2)


def batch():
    texts, answers = prompts(3, lengths=TEXTS), prompts(3, lengths=ANSWERS, seed=8)
    ids, mask = pad(texts, "right", value=7)
    decoder_ids, decoder_mask = pad(answers, "right", value=7)
    return (
        texts,
        answers,
        {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": decoder_ids,
            "decoder_attention_mask": decoder_mask,
        },
    )


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "non-reentrant", "reentrant"])
def test_padding(model, checkpointing):
    model.train()
    texts, answers, whole = batch()
    expected = []
    for text, answer in zip(texts, answers):
        logits = model(input_ids=text[None], decoder_input_ids=answer[None], use_cache=False).logits[0]
        answer_of(logits).backward()
        expected.append(logits.detach())
    wanted = gradients(model)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    logits = model(**whole, use_cache=False).logits
    logits = [row[: len(answer)] for row, answer in zip(logits, answers)]
    if checkpointing is not None:
        model(**{name: value.flip(0) for name, value in whole.items()}, use_cache=False)
    sum(map(answer_of, logits)).backward()
    check(model, logits, expected, wanted)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(model, beams):
    texts, _, whole = batch()
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "eos_token_id": None}
    answers = model.generate(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"], **options)
    for text, answer in zip(texts, answers):
        assert torch.equal(model.generate(input_ids=text[None], **options)[0], answer)


def test_an_adapter_for_each_row(model):
    import copy

    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.eval().double()
    texts, answers, whole = batch()
    names = ["second", "__base__", "default"]
    with torch.no_grad():
        logits = model(**whole, adapter_names=names).logits
        for row, name in enumerate(names):
            if name != "__base__":
                model.set_adapter(name)
            with model.disable_adapter() if name == "__base__" else torch.no_grad():
                alone = model(input_ids=texts[row][None], decoder_input_ids=answers[row][None]).logits[0]
            assert relative(logits[row, : len(alone)], alone) < TOLERANCE
