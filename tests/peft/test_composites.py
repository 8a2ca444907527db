"""Models whose text model is an encoder and a decoder by itself: BLIP-2 and InstructBLIP with T5, Florence-2."""

import pytest
import torch
import transformers as hf

from . import models
from .models import IMAGE_TOKEN, gradients, pad, prompts, relative
from .test_encoder_decoder import SIZES
from .test_exact_training import answer_of, check

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QFORMER = {
    "vocab_size": 96,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "encoder_hidden_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
T5 = {**SIZES, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BLIP = {"num_query_tokens": 3, "image_token_index": IMAGE_TOKEN}


def _blip2():
    text = hf.T5Config(**T5).to_dict()
    return hf.Blip2ForConditionalGeneration(
        hf.Blip2Config(vision_config=VISION, qformer_config=QFORMER, text_config=text, **BLIP)
    )


def _instructblip():
    text = hf.T5Config(**T5).to_dict()
    return hf.InstructBlipForConditionalGeneration(
        hf.InstructBlipConfig(vision_config=VISION, qformer_config=QFORMER, text_config=text, **BLIP)
    )


def _florence2():
    vision = {
        "embed_dim": [8, 8],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "depths": [1, 1],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "patch_prenorm": [False, True],
        "window_size": 2,
        "projection_dim": 32,
        "drop_path_rate": 0.0,
    }
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("ffn_dim", 48), ("layers", 2))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    text = {**SIZES, **sizes, **heads, "model_type": "bart", "max_position_embeddings": 64, "dropout": 0.0}
    return hf.Florence2ForConditionalGeneration(
        hf.Florence2Config(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)
    )


#: By name: how to build the model, and how many tokens an image takes.
COMPOSITES = {"blip2": (_blip2, 3), "instructblip": (_instructblip, 3), "florence2": (_florence2, 5)}
LINEAR = r".*language_model\..*\.(q|k|v|o|wi|wo|[qkv]_proj|out_proj|fc1|fc2)"
ANSWERS = (4, 9, 2)  # of tokens


@pytest.fixture(params=COMPOSITES)
def composite(request):
    """The adapted model, its instances' inputs, and the same as one batch."""
    torch.manual_seed(0)
    build, image_tokens = COMPOSITES[request.param]
    model = models.adapt(build().eval(), task_type=None, target_modules=LINEAR).double()
    texts = prompts(3, image_tokens=image_tokens)
    pixels = torch.randn(3, 3, 8, 8, dtype=torch.double)
    alone = [
        {"input_ids": text[None], "attention_mask": torch.ones_like(text)[None], "pixel_values": image[None]}
        for text, image in zip(texts, pixels)
    ]
    ids, mask = pad(texts, "right", value=7)
    whole = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    if request.param == "instructblip":  # its query transformer reads the question as well
        for inputs in (whole, *alone):
            inputs |= {f"qformer_{name}": inputs[name] for name in ("input_ids", "attention_mask")}
    return model, alone, whole


def test_padding(composite):
    model, alone, whole = composite
    model.train()
    answers = prompts(3, lengths=ANSWERS, seed=8)
    expected = []
    for inputs, answer in zip(alone, answers):
        logits = model(**inputs, labels=answer[None]).logits[0]
        answer_of(logits).backward()
        expected.append(logits.detach())
    wanted = gradients(model)
    rows, mask = pad(answers, "right", value=7)
    logits = model(**whole, labels=rows.masked_fill(mask == 0, -100)).logits
    logits = [row[: len(answer)] for row, answer in zip(logits, answers)]
    sum(map(answer_of, logits)).backward()
    check(model, logits, expected, wanted)


def test_generation_keeps_the_routing_of_the_prompt(composite):
    """Each row of a batch has the answer that it has alone, with the logits of a training forward on that answer."""
    model, alone, whole = composite
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    batch = model.generate(**whole, **options)
    for row, inputs in enumerate(alone):
        single = model.generate(**inputs, **options)
        assert torch.equal(single.sequences[0], batch.sequences[row])
        with torch.no_grad():
            trained = model(**inputs, labels=single.sequences[:, 1:]).logits[0]
        assert relative(torch.cat(single.logits), trained) < 2**-24  # generate rounds the logits to float32
