"""Generation: each instance is decoded as if it were alone, under one routing from its first to its last token."""

import copy

import pytest
import torch

from mixlora_kernels.peft import ConditionalMixLoRAConfig

from . import models
from .models import FAMILIES, IMAGE_TOKEN, build, pad, prompts, relative

TOLERANCE = 1e-6  # rotary angles are float32, and padding shifts positions; a wrong routing is off by 1e-2 and more
STEPS = 6
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
NO_END = {"eos_token_id": None, "pad_token_id": 0}


def adapt(model, **settings):
    return models.adapt(model, **settings).double()


def extra(family, ids):
    return {"mm_token_type_ids": (ids == IMAGE_TOKEN).long()} if family == "qwen2_5_vl" else {}


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(input_ids=ids, attention_mask=mask, **{**GREEDY, **NO_END, **options})
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1) if out.logits else None, out.past_key_values


def teacher(model, tokens, answer):
    """The logits of an answer's tokens in one forward with the routing of the prompt, without a cache."""
    model.base_model.peft_config["default"].pool = "prompt"
    ids = torch.cat((tokens, answer))[None]
    labels = ids.clone()
    labels[:, : len(tokens)] = -100
    logits = model(input_ids=ids, labels=labels, use_cache=False).logits[0]
    model.base_model.peft_config["default"].pool = "sequence"
    return logits[len(tokens) - 1 : -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_in_a_padded_batch(family):
    kind = FAMILIES[family]
    model = adapt(build(family))
    instances = prompts(3, image_tokens=kind.image_tokens)
    torch.manual_seed(5)
    images = {name: v.double() if v.is_floating_point() else v for name, v in kind.images(3).items()}
    ids, mask = pad(instances, "left", value=0)
    answers, logits, _ = generate(model, ids, mask, **images, **extra(family, ids))
    for row, tokens in enumerate(instances):
        own = {name: value.chunk(3)[row] for name, value in images.items()}
        one, own_logits, _ = generate(model, tokens[None], **own, **extra(family, tokens[None]))
        assert torch.equal(answers[row], one[0])
        assert relative(logits[row], own_logits[0]) < TOLERANCE


def test_embeddings_in_the_place_of_tokens():
    model = adapt(build())
    instances = prompts(3)
    ids, mask = pad(instances, "left", value=0)
    embeddings = model.get_input_embeddings()(ids).detach()
    with torch.inference_mode():
        out = model.generate(inputs_embeds=embeddings, attention_mask=mask, **{**GREEDY, **NO_END})
    for row, tokens in enumerate(instances):
        one, own, _ = generate(model, tokens[None])
        assert torch.equal(out.sequences[row], one[0])
        assert relative(torch.stack(out.logits, 1)[row], own[0]) < TOLERANCE


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_one_routing_from_prefill_to_the_end(cache):
    """The steps through the cache give what one forward gives under the prompt's routing."""
    model = adapt(build())
    for tokens in prompts(3):
        answer, logits, _ = generate(model, tokens[None], cache_implementation=cache)
        assert relative(logits[0], teacher(model, tokens, answer[0])) < TOLERANCE


def test_a_step_that_routes_anew_would_show():
    model = adapt(build(), decode="token")
    tokens = prompts(1)[0]
    answer, logits, _ = generate(model, tokens[None])
    assert relative(logits[0], teacher(model, tokens, answer[0])) > 1e-2


def test_static_cache_in_a_padded_batch():
    model = adapt(build())
    instances = prompts(3)
    ids, mask = pad(instances, "left", value=0)
    answers, logits, _ = generate(model, ids, mask, cache_implementation="static")
    for row, tokens in enumerate(instances):
        one, own, _ = generate(model, tokens[None])
        assert torch.equal(answers[row], one[0])
        assert relative(logits[row], own[0]) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 3, "cache_implementation": "static"},
    ],
    ids=["beam", "beam-return-2", "beam-static"],
)
def test_beams(options):
    model = adapt(build())
    instances = prompts(3)
    ids, mask = pad(instances, "left", value=0)
    kept = options.get("num_return_sequences", 1)
    options = {**options, "output_logits": False, "output_scores": True}
    out = model.generate(input_ids=ids, attention_mask=mask, **{**GREEDY, **NO_END, **options})
    for row, tokens in enumerate(instances):
        one = model.generate(input_ids=tokens[None], **{**GREEDY, **NO_END, **options})
        rows = slice(row * kept, (row + 1) * kept)
        assert torch.equal(out.sequences[rows, ids.shape[1] :], one.sequences[:, len(tokens) :])
        assert relative(out.sequences_scores[rows], one.sequences_scores) < TOLERANCE


def test_returned_sequences():
    """Sampling three continuations of each row; each is scored as its own instance."""
    model = adapt(build())
    instances = prompts(2)
    ids, mask = pad(instances, "left", value=0)
    torch.manual_seed(0)
    answers, logits, _ = generate(model, ids, mask, do_sample=True, num_return_sequences=3)
    for row in range(6):
        expected = teacher(model, instances[row // 3], answers[row])
        assert relative(logits[row], expected) < TOLERANCE


@pytest.mark.parametrize("decode", ["prompt", "token"])
@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_assisted_decoding(decode, how):
    """Candidates come along with the prompt and in groups, and are no part of the prompt."""
    model = adapt(build(), decode=decode)
    tokens = prompts(1)[0]
    tokens = torch.cat((tokens, tokens))  # something to look up
    helper = {"assistant_model": build("llama").double()} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    answer, logits, _ = generate(model, tokens[None], max_new_tokens=10)
    assisted, assisted_logits, _ = generate(model, tokens[None], max_new_tokens=10, **helper)
    assert torch.equal(answer, assisted)
    assert relative(assisted_logits, logits) < TOLERANCE


def test_a_second_turn_on_an_old_cache():
    model = adapt(build())
    first, further = prompts(2)
    answer, _, cache = generate(model, first[None])
    ids = torch.cat((first, answer[0], further))
    second, logits, _ = generate(model, ids[None], past_key_values=cache)
    # All that follows the first prompt goes with the first prompt's routing.
    expected = teacher(model, first, torch.cat((answer[0], further, second[0])))[-STEPS:]
    assert relative(logits[0], expected) < TOLERANCE


@torch.no_grad()  # caches with a graph cannot be copied
def test_generations_that_take_turns_and_copied_caches():
    model = adapt(build())
    caches, expected = [], []
    for tokens in prompts(2):
        caches.append(model(input_ids=tokens[None], use_cache=True).past_key_values)
        expected.append(teacher(model, tokens, torch.tensor([11, 12, 13]))[1:])
    caches.append(copy.deepcopy(caches[0]))
    expected.append(expected[0])
    found = [[] for _ in caches]
    for token in (11, 12):
        for logits, cache in zip(found, caches):
            logits.append(model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    for logits, wanted in zip(found, expected):
        assert relative(torch.stack(logits), wanted) < TOLERANCE


def test_one_prompt_continued_in_several_ways():
    model = adapt(build())
    tokens = prompts(1)[0]
    cache = model(input_ids=tokens[None], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    logits = model(input_ids=torch.tensor([[11], [12]]), past_key_values=cache).logits[:, -1]
    for row, token in enumerate((11, 12)):
        expected = teacher(model, tokens, torch.tensor([token, 0]))[1]
        assert relative(logits[row], expected) < TOLERANCE


def test_a_static_cache_used_again():
    from transformers import StaticCache

    model = adapt(build())
    cache = StaticCache(config=model.config, max_cache_len=32)
    for tokens in prompts(2):
        cache.reset()
        _, logits, _ = generate(model, tokens[None], past_key_values=cache)
        _, expected, _ = generate(model, tokens[None])
        assert relative(logits, expected) < TOLERANCE


def test_every_step_routes_anew_where_it_is_told_to():
    """decode="token", as the released code: each step is an instance of one token."""
    model = adapt(build(), decode="token")
    tokens = prompts(1)[0]
    answer, logits, _ = generate(model, tokens[None])
    # The same by packing: the prompt's tokens, then each token of the answer on its own, as MixLoRA sees them.
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    report = model.routing_report()["default"][layer.key]
    x = model.get_input_embeddings()(answer[:, -2:-1])  # what the last step was given
    x = model.base_model.model.model.layers[0].input_layernorm(x)
    _, routing = layer.mixlora_adapter["default"](x, layer.base_layer)
    usage = torch.bincount(routing.index_a.flatten(), minlength=6).tolist()
    assert report["usage_a"] == usage
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_a_further_turn_that_routes_anew_leaves_padding_out():
    """decode="token" and new tokens of unequal number, padded on the left behind what is in the cache."""
    model = adapt(build(), decode="token")

    def turns(first, mask, second, second_mask):
        step = torch.full_like(first[:, :1], 5)
        masks = torch.cat((mask, torch.ones_like(step), second_mask), 1)
        positions = (masks.cumsum(1) - 1).clamp(min=0)
        parts, cache, done = (first, step, second), None, 0
        for ids in parts:
            end = done + ids.shape[1]
            out = model(
                input_ids=ids, attention_mask=masks[:, :end], position_ids=positions[:, done:end],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache, done = out.past_key_values, end
        return out.logits

    firsts, seconds = prompts(2), prompts(2, lengths=(3, 2), seed=9)
    batch = turns(*pad(firsts, "left"), *pad(seconds, "left"))
    for row, (first, second) in enumerate(zip(firsts, seconds)):
        alone = turns(*pad([first], "left"), *pad([second], "left"))[0]
        assert relative(batch[row, -len(second) :], alone) < TOLERANCE


@pytest.mark.parametrize("settings", [{}, {"decode": "token"}], ids=["prompt", "token"])
def test_task_embedding(settings):
    from mixlora_kernels.peft import task_embedding

    model = adapt(build(), routing="task", task_dim=4, **settings)
    instances = prompts(3)
    ids, mask = pad(instances, "left", value=0)
    task = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for options in ({}, {"num_beams": 2, "output_logits": False}):
        with task_embedding(model, task):
            answers, logits, _ = generate(model, ids, mask, **options)
        for row, tokens in enumerate(instances):
            with task_embedding(model, task[row : row + 1]):
                one, own, _ = generate(model, tokens[None], **options)
            assert torch.equal(answers[row], one[0])
            assert logits is None or relative(logits[row], own[0]) < TOLERANCE


def test_an_adapter_for_each_row():
    model = adapt(build())
    config = ConditionalMixLoRAConfig(r=3, num_factors=7, init_weights=False, task_type="CAUSAL_LM")
    model.add_adapter("second", config)
    model.eval().double()
    instances = prompts(3)
    ids, mask = pad(instances, "left", value=0)
    names = ["second", "__base__", "default"]
    for options in ({}, {"num_beams": 2, "output_logits": False}):
        answers, logits, _ = generate(model, ids, mask, adapter_names=names, **options)
        for row, (name, tokens) in enumerate(zip(names, instances)):
            if name == "__base__":
                with model.disable_adapter():
                    one, own, _ = generate(model, tokens[None], **options)
            else:
                model.set_adapter(name)
                one, own, _ = generate(model, tokens[None], **options)
            assert torch.equal(answers[row], one[0])
            assert logits is None or relative(logits[row], own[0]) < TOLERANCE
    model.set_adapter("default")
