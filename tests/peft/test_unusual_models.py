"""Models and forwards that are built or run in other ways than most: a cache without a length, a forward within a
forward, layers on several devices."""

import torch
import transformers as hf

from .models import build, pad, prompts, relative
from .test_exact_generation import TOLERANCE, adapt, generate, teacher


def test_a_cache_of_states_alone():
    """Mamba's does not tell how many tokens it has seen."""
    torch.manual_seed(0)
    config = hf.MambaConfig(vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0)
    model = adapt(hf.MambaForCausalLM(config), target_modules=["in_proj", "out_proj"])
    tokens = torch.arange(3, 12)
    answer, logits, _ = generate(model, tokens[None])
    assert relative(logits[0], teacher(model, tokens, answer[0])) < TOLERANCE


def test_a_forward_within_a_forward():
    """A layer's hook runs the model on another text, in the middle of the outer forward."""
    model = adapt(build())
    outer, inner = pad(prompts(2), "left", value=0), torch.arange(3, 8)[None]
    wanted = model(input_ids=outer[0], attention_mask=outer[1]).logits, model(input_ids=inner).logits
    layer, found = model.get_base_model().model.layers[1], []

    def look(_module, _args):
        if not found:
            found.append(None)
            found.append(model(input_ids=inner).logits)

    handle = layer.register_forward_pre_hook(look)
    got = model(input_ids=outer[0], attention_mask=outer[1]).logits
    handle.remove()
    assert torch.equal(got, wanted[0]) and torch.equal(found[1], wanted[1])


def test_layers_on_several_devices():
    """As with device_map="auto", where a hook hands the hidden states to the next device but the mask lies on the
    first; "meta" stands for the second device."""
    model = adapt(build())
    ids, mask = pad(prompts(2), "left", value=0)

    def send(thing):
        if isinstance(thing, tuple):
            return tuple(map(send, thing))
        return thing.to("meta") if isinstance(thing, torch.Tensor) else thing

    def hook(_module, args, kwargs):
        return send(args), {name: send(value) for name, value in kwargs.items()}

    decoder = model.get_base_model()
    for module in (decoder.model.layers[1], decoder.model.norm, decoder.lm_head):
        module.to("meta").register_forward_pre_hook(hook, with_kwargs=True)
    labels = ids.masked_fill(mask == 0, -100)
    assert model(input_ids=ids, attention_mask=mask).logits.shape == (*ids.shape, 96)
    model.train()(input_ids=ids, attention_mask=mask, labels=labels)
