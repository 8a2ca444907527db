"""pool="text": the mean of Equation 5 runs over the prompt's text, without the tokens that stand for images."""

import pytest
import torch

from mixlora_kernels.peft.media import media_ids, text_of_prompt
from mixlora_kernels.peft.side_information import find_side_information

from .models import FAMILIES, IMAGE_TOKEN, adapt, build, pad, prompts, relative

WITH_IMAGES = [name for name, family in FAMILIES.items() if family.image_tokens]


def asked(family: str, side: str = "right") -> dict:
    """Three prompts with an image each."""
    torch.manual_seed(5)
    ids, mask = pad(prompts(3, image_tokens=FAMILIES[family].image_tokens), side)
    return {"input_ids": ids, "attention_mask": mask, **FAMILIES[family].images(3)}


def routed(model, **inputs) -> dict:
    """The first layer's routing, by the name of its linear layer; and what q_proj read, [B, L, d_in]."""
    decoder = model.base_model.model.get_decoder().layers[0]
    read = []
    handle = decoder.input_layernorm.register_forward_hook(lambda module, args, out: read.append(out.detach()))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    (name,) = [name for name, module in model.base_model.model.named_modules() if module is decoder.self_attn.q_proj]
    return {"routing": find_side_information(model).last[name, "default"], "x": read[0], "layer": decoder}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", WITH_IMAGES)
def test_the_mean_is_that_of_the_text(family, side):
    """p_A = softmax(router_A · mean of the hidden states at text tokens), written out."""
    model, inputs = adapt(build(family), pool="text"), asked(family, side)
    found = routed(model, **inputs)
    text = (inputs["input_ids"] != IMAGE_TOKEN) & inputs["attention_mask"].bool()
    assert (text.sum(1) == torch.tensor([9, 6, 7])).all()
    mean = torch.stack([x[own].mean(0) for x, own in zip(found["x"], text)])
    router = found["layer"].self_attn.q_proj.mixlora_adapter["default"].router_A
    expected = (mean @ router.T).softmax(-1)
    assert relative(found["routing"].probs_a, expected) < 1e-5
    with_images = routed(adapt(build(family), pool="prompt"), **inputs)["routing"].probs_a
    assert relative(with_images, expected) > 1e-2


def test_training_routes_as_the_prompt_alone_does():
    """With an answer behind the prompt, and labels that tell it."""
    model, inputs = adapt(build("llava"), pool="text"), asked("llava", "left")
    alone = routed(model, **inputs)["routing"]
    answer = torch.full((3, 4), 11)
    ids, mask = (torch.cat((inputs[n], new), 1) for n, new in (("input_ids", answer), ("attention_mask", answer // 11)))
    labels = ids.clone()
    labels[:, : inputs["input_ids"].shape[1]] = -100
    whole = inputs | {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = routed(model.train(), **whole)["routing"]
    assert torch.equal(found.index_a, alone.index_a) and relative(found.probs_a, alone.probs_a) < 1e-5


def test_generation_keeps_the_routing_of_the_text():
    """Each prompt in a batch gives the tokens that it gives alone."""
    model, inputs = adapt(build("llava"), pool="text"), asked("llava", "left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for row, tokens in enumerate(together):
        real = inputs["attention_mask"][row].bool()
        alone = model.generate(
            input_ids=inputs["input_ids"][row, real][None], attention_mask=inputs["attention_mask"][row, real][None],
            pixel_values=inputs["pixel_values"][row][None], **options,
        )  # fmt: skip
        assert torch.equal(alone[0, real.sum() :], tokens)


def test_without_images_it_is_the_prompt():
    """Of a model without images, bit for bit, and it needs no input_ids; of a LLaVA that gets none."""
    ids, mask = pad(prompts(3), "right")
    text, prompt = (adapt(build(), pool=pool) for pool in ("text", "prompt"))
    with torch.no_grad():
        embedded = text.get_input_embeddings()(ids)
        expected = prompt(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(text(input_ids=ids, attention_mask=mask).logits, expected)
        assert torch.equal(text(inputs_embeds=embedded, attention_mask=mask).logits, expected)
        text, prompt = (adapt(build("llava"), pool=pool) for pool in ("text", "prompt"))
        found, expected = (model(input_ids=ids, attention_mask=mask).logits for model in (text, prompt))
    assert relative(found, expected) < 1e-6


def test_unknown_text_is_refused():
    model, inputs = adapt(build("llava"), pool="text"), asked("llava")
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="pool='text' needs input_ids"):
        model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match="pool='text' needs input_ids"):
        model.base_model.model.get_decoder()(inputs_embeds=embedded)

    class Unknown:
        vision_config = object()

    ids = media_ids(Unknown())
    assert isinstance(ids, str) and "Unknown has vision_config, and none of image_token_id" in ids
    with pytest.raises(ValueError, match="Set pool='prompt'"):
        text_of_prompt(ids, None, None, (1, 3))
    with pytest.raises(ValueError, match="a token of input_ids for each of the decoder's"):
        text_of_prompt(torch.zeros(1, 3, dtype=torch.bool), None, None, (1, 7))
    assert media_ids(build().config) == () == media_ids(None)


def test_text_masks():
    media = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    prompt = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    expected = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 0, 0]]).bool()  # the second prompt has no text: all of it
    assert torch.equal(text_of_prompt(media, prompt, None, (2, 5)), expected)
    starts = torch.tensor([[1, 0, 0, 1, 0]]).bool()  # packed: two tokens of images alone, then text
    media = torch.tensor([[1, 1, 1, 0, 1]]).bool()
    expected = torch.tensor([[1, 1, 1, 1, 0]]).bool()
    assert torch.equal(text_of_prompt(media, None, starts, (1, 5)), expected)
