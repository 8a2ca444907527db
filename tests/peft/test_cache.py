"""The cache under any name, and forwards that continue a sequence without one."""

import pytest
import torch
import transformers
from torch import nn

from mixlora_kernels.peft.cache import find_past

from .models import TEXT, adapt, build, pad, prompts, relative

IDS = torch.stack([tokens[:6] for tokens in prompts(2)])
STEP = torch.tensor([[11], [12]])
CONTINUES = rf"continues a sequence.*transformers {transformers.__version__}"


class Other(nn.Module):
    """A decoder of another library: it takes its cache under ``name``, and returns it in a tuple."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.embed, self.q_proj = name, nn.Embedding(96, 32), nn.Linear(32, 32)

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        cache = kwargs.get(self.name)
        x = self.embed(input_ids)
        y = self.q_proj(x)
        if cache is not None:
            cache.update(x[:, None], x[:, None], 0)
        return y, cache


def other(name: str = "anything"):
    torch.manual_seed(0)
    return adapt(Other(name), target_modules=["q_proj"], task_type=None)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params", "a_name_to_come"])
def test_any_name(name):
    model, cache = other(name), transformers.DynamicCache()
    whole, _ = model(torch.cat((IDS, STEP), 1), **{name: None})
    model(IDS, **{name: cache})
    kept = {place: routing.index_a for place, routing in model.base_model.side.last.items()}
    step, _ = model(STEP, **{name: cache})
    assert {place: routing.index_a for place, routing in model.base_model.side.last.items()}.keys() == kept.keys()
    for place, routing in model.base_model.side.last.items():
        assert torch.equal(routing.index_a, kept[place])
    # Routed anew, on the step alone or with it, the output is another.
    assert relative(step, model(STEP)[0]) > 1e-2
    assert relative(step[:, 0], whole[:, -1]) > 1e-2


def test_a_cache_given_by_position():
    model, positions = adapt(build()), torch.full((2, 1), 6)
    decoder, found = model.base_model.model.model, []
    for by_place in (True, False):
        cache = transformers.DynamicCache(config=model.config)
        model(input_ids=IDS, past_key_values=cache)
        if by_place:
            found.append(decoder(STEP, None, positions, cache).last_hidden_state)
        else:
            found.append(decoder(input_ids=STEP, position_ids=positions, past_key_values=cache).last_hidden_state)
    assert torch.equal(*found)
    assert relative(found[0], decoder(STEP).last_hidden_state) > 1e-2


@pytest.mark.parametrize(
    "told",
    [
        {"attention_mask": torch.ones(2, 7)},
        {"attention_mask": torch.ones(2, 1, 1, 7, dtype=torch.bool)},
        {"attention_mask": {"full_attention": torch.ones(2, 1, 1, 7, dtype=torch.bool)}},
        {"position_ids": torch.full((2, 1), 6)},
        {"position_ids": torch.full((1, 1), 1)},
        {"position_ids": torch.full((3, 2, 1), 6)},
        {"position_ids": torch.full((4, 2, 1), 6)},
        {"cache_position": torch.tensor([6])},
    ],
    ids=lambda told: " ".join(f"{name} {tuple(getattr(value, 'shape', ()))}" for name, value in told.items()),
)
@pytest.mark.parametrize("decode", ["prompt", "token"])
def test_a_step_without_a_cache(told, decode):
    torch.manual_seed(0)
    model = adapt(Other("cache"), target_modules=["q_proj"], task_type=None, decode=decode)
    with pytest.raises(ValueError, match=CONTINUES):
        model(STEP, **told)
    with model.disable_adapter():
        model(STEP, **told)
    model(STEP)  # and nothing of it is left


@pytest.mark.parametrize(
    "told",
    [
        {"position_ids": torch.arange(6, 12)[None]},
        {"position_ids": torch.tensor([[0, 1, 2, 57, 0, 1]] * 2)},  # two prompts, and a step of another sequence
        {"cache_position": torch.arange(6, 12)},
        {"attention_mask": torch.ones(2, 12)},
        {"position_ids": torch.arange(6, 12)[None], "attention_mask": torch.ones(2, 6)},
    ],
)
def test_more_tokens_without_a_cache(told):
    with pytest.raises(ValueError, match=CONTINUES):
        other()(IDS, **told)


MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"position_ids": torch.arange(6)[None]},
        {"position_ids": torch.arange(6)[None], "attention_mask": MASK},  # counted from the padding on
        {"position_ids": (MASK.cumsum(1) - 1).clamp(min=0), "attention_mask": MASK},
        {"position_ids": (MASK.cumsum(1) - 1).masked_fill(MASK == 0, 1), "attention_mask": MASK},
        {"position_ids": torch.arange(1, 7)[None]},  # PaliGemma's count
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)},
        {"position_ids": torch.tensor([0, 1, 1, 1, 2, 3]).expand(3, 2, 6)},
        {"cache_position": torch.arange(6)},
        {"attention_mask": torch.ones(2, 1, 6, 6).tril().bool()},
    ],
)
def test_where_a_sequence_begins_nothing_is_refused(told):
    y, _ = other()(IDS, **told)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("name, cache", [("past_key_values", ((torch.ones(1), torch.ones(1)),)), ("mems", [])])
def test_caches_of_an_unknown_kind(name, cache):
    with pytest.raises(ValueError, match=rf"{name} \({type(cache).__name__}\).*model\.generate"):
        other()(IDS, **{name: cache})


def test_continuous_batching_is_refused_by_name():
    model = adapt(build())
    options = transformers.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    size = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # else most of the memory
    results = model.generate_batch(
        inputs=[tokens.tolist() for tokens in prompts(2)], generation_config=options, progress_bar=False,
        continuous_batching_config=size,
    )  # fmt: skip
    assert len(results) == 2
    for result in results.values():
        assert not result.generated_tokens
        assert "PagedAttentionCache" in result.error and "model.generate()" in result.error


def test_what_is_no_cache():
    named = {"use_cache": True, "cache_position": torch.arange(2), "output": None, "mask": {"a": torch.ones(1)}}
    assert find_past(named, 2) == (None, 0, None, None)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generated_logits_are_those_of_one_forward_with_the_prompts_routing(kind):
    """The issue's bound of 1e-5, in float32."""
    model = adapt(build(), alpha=4)
    for tokens in prompts(3):
        out = model.generate(
            input_ids=tokens[None], max_new_tokens=12, do_sample=False, output_logits=True, eos_token_id=None,
            return_dict_in_generate=True, pad_token_id=0, cache_implementation=kind,
        )  # fmt: skip
        labels = out.sequences.clone()
        labels[:, : len(tokens)] = -100
        logits = model(input_ids=out.sequences, labels=labels, use_cache=False).logits[0, len(tokens) - 1 : -1]
        assert relative(torch.stack(out.logits, 1)[0], logits) < 1e-5


@torch.no_grad()
def test_a_batch_of_a_model_that_counts_from_one():
    """PaliGemma's prefill is no continuation. (Rows of one length: it masks a padded batch in another way.)"""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4, "projection_dim": 32, "model_type": "siglip_vision_model"}  # fmt: skip
    text = {**TEXT, "model_type": "gemma", "head_dim": 8}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=95, projection_dim=32, hidden_size=32, vocab_size=96
    )
    model = adapt(transformers.PaliGemmaForConditionalGeneration(config).eval())
    instances = [torch.cat((torch.full((4,), 95), tokens)) for tokens in prompts(2, lengths=(7, 7))]
    pixels = torch.randn(2, 3, 8, 8)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids, mask = pad(instances, "left")
    found = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **options)[:, ids.shape[1] :]
    for row, tokens in enumerate(instances):
        one = model.generate(input_ids=tokens[None], pixel_values=pixels[row : row + 1], **options)[0, len(tokens) :]
        assert torch.equal(found[row], one)
