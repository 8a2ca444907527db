"""Forwards that cannot be routed as they are asked for: a clear error, and nothing of it is left."""

import copy

import pytest
import torch
import transformers as hf
from packaging.version import Version
from peft import inject_adapter_in_model

from mixlora_kernels.peft import ConditionalMixLoRAConfig, routing_report, task_embedding
from mixlora_kernels.peft.cache import find_past
from mixlora_kernels.peft.forward_pass import ForwardPass
from mixlora_kernels.peft.model_inputs import ModelInputs

from .models import adapt, build
from .test_refusals import IDS, assert_same, state


def test_task_embedding_missing_at_a_step():
    model = adapt(build(), routing="task", task_dim=4)
    task = torch.randn(2, 4)
    model(input_ids=IDS, task_embedding=task)
    with pytest.raises(ValueError, match="needs the task embedding at every step"):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match="needs the task embedding at every step"):
        model.generate(input_ids=IDS, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"task must have the shape"):
        model(input_ids=IDS, task_embedding=task[:, :3])
    with pytest.raises(ValueError, match=r"task must have the shape"):
        model(input_ids=IDS, task_embedding=task[:1].expand(3, -1))
    with pytest.raises(ValueError, match="no MixLoRA layers"), task_embedding(build(), task):
        pass
    with model.disable_adapter():
        model(input_ids=IDS)


def test_adapter_names():
    model = adapt(build())
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        model(input_ids=IDS, adapter_names=["default", "nobody"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(input_ids=IDS, adapter_names=["default"])
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(input_ids=IDS, adapter_names=["default", "default"])
    packed = {"input_ids": IDS[:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": False}
    with pytest.raises(ValueError, match="packed"):
        model.eval()(**packed, adapter_names=["default"])


PACKED = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
BLOCKS = torch.block_diag(*[torch.ones(3, 3).tril()] * 2).bool().expand(2, 1, 6, 6)


@pytest.mark.parametrize(
    "told, message",
    [
        ({"position_ids": PACKED, "attention_mask": torch.ones(2, 6)}, "position_ids start anew.*attention_mask"),
        ({"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]] * 2), "attention_mask": torch.ones(2, 6)}, "seq_idx says"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 6, 12]), "attention_mask": torch.ones(2, 6)}, "cu_seq_lens_q says"),
        ({"attention_mask": BLOCKS}, "attention_mask divides the tokens"),
        ({"attention_mask": BLOCKS, "position_ids": PACKED}, "attention_mask divides the tokens"),
        ({"attention_mask": torch.where(BLOCKS, 0.0, -1e9)}, "attention_mask divides the tokens"),
        ({"position_ids": PACKED, "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)}, "contradict one another"),
        ({"position_ids": PACKED, "cu_seq_lens_q": torch.tensor([0, 6, 12])}, "contradict one another"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, "from 0 to the 12 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 12])}, "spans two"),
        ({"cu_seq_lens_q": torch.tensor([[0, 12]])}, "shape"),
        ({"seq_idx": torch.zeros(2, 5, dtype=torch.long)}, "seq_idx must have the shape"),
    ],
)
def test_packing_that_contradicts_itself(told, message):
    model = adapt(build())
    before = state(model)
    with pytest.raises(ValueError, match=message):
        model(input_ids=IDS, use_cache=False, **told)
    assert_same(model, before)
    model(input_ids=IDS, use_cache=False)  # and nothing of it is left


def test_labels():
    model = adapt(build(), pool="prompt").train()
    with pytest.raises(ValueError, match="labels must have the shape"):
        model(input_ids=IDS, labels=IDS[:, :3])


def test_a_prompt_in_chunks():
    model = adapt(build())
    with pytest.raises(ValueError, match="prefilled in chunks"):
        model.generate(input_ids=IDS, max_new_tokens=2, prefill_chunk_size=3)
    cache = model(input_ids=IDS[:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="prefilled in chunks"):
        model(input_ids=IDS[:, 3:], past_key_values=cache)
    injected = inject_adapter_in_model(ConditionalMixLoRAConfig(r=1, num_factors=2), model.unload())
    with pytest.raises(ValueError, match="prefilled in chunks"):
        injected.generate(input_ids=IDS, max_new_tokens=2, prefill_chunk_size=3)


def test_a_cache_of_others():
    model = adapt(build())
    with model.disable_adapter():
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled without this adapter"):
        model(input_ids=IDS[:, :1], past_key_values=cache)
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    model.add_adapter("second", ConditionalMixLoRAConfig(r=1, num_factors=3, task_type="CAUSAL_LM"))
    model.set_adapter("second")  # in the middle of a generation
    with pytest.raises(ValueError, match="no routing of adapter 'second'"):
        model(input_ids=IDS[:, :1], past_key_values=cache)
    model.set_adapter("default")
    model(input_ids=IDS[:, :1], past_key_values=cache)
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled for 2 rows, the forward has 1"):
        cache.batch_select_indices(torch.tensor([0]))
        model(input_ids=IDS[:1, :1], past_key_values=cache)


def test_layers_that_see_other_tokens():
    """A mask that cannot be applied is not left out in silence."""
    model = adapt(build(), target_modules=["lm_head"])
    mask = torch.ones(2, 6, dtype=torch.long)
    model(input_ids=IDS, attention_mask=mask)
    with pytest.raises(ValueError, match="lm_head gets an input of shape"):
        model(input_ids=IDS, attention_mask=mask, logits_to_keep=1)


def test_data_parallel():
    model = adapt(build())
    replica = copy.copy(model.base_model.model)
    replica._is_replica = True
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(input_ids=IDS)


def test_a_report_before_a_forward():
    with pytest.raises(ValueError, match="has not run a forward yet"):
        adapt(build()).routing_report()
    with pytest.raises(ValueError, match="no MixLoRA layers"):
        routing_report(build())


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("decode", ["prompt", "token"])
def test_generation_without_a_cache(decode, beams):
    """Each of its forwards has all tokens so far, of which nothing tells the prompt."""
    model, options = adapt(build(), decode=decode), {"max_new_tokens": 3, "eos_token_id": None, "num_beams": beams}
    with pytest.raises(ValueError, match=r"without a cache.*generate with use_cache=True"):
        model.generate(input_ids=IDS, use_cache=False, **options)
    model.generate(input_ids=IDS, use_cache=True, **options)
    injected = inject_adapter_in_model(ConditionalMixLoRAConfig(r=1, num_factors=2), model.unload())
    injected.generation_config.use_cache = False
    with pytest.raises(ValueError, match=r"without a cache.*generate with use_cache=True"):
        injected.generate(input_ids=IDS, **options)


def test_generation_without_a_cache_where_it_changes_nothing():
    """A task's embedding routes each forward alike."""
    model, task = adapt(build(), routing="task", task_dim=4), torch.randn(2, 4)
    options = {"max_new_tokens": 4, "eos_token_id": None}
    with task_embedding(model, task):
        answers = [model.generate(input_ids=IDS, use_cache=cached, **options) for cached in (False, True)]
    assert torch.equal(*answers)


def test_forwards_of_other_lengths_without_a_cache():
    model = adapt(build())
    model(input_ids=IDS[:, :3], use_cache=False)
    model(input_ids=IDS[:, 1:5], use_cache=False)  # other tokens
    model(input_ids=IDS, use_cache=False)  # two more tokens
    model(input_ids=IDS[:, :5])
    model(input_ids=IDS)  # makes a cache


def test_a_cache_that_was_cut_or_reset():
    model = adapt(build())
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    cache.crop(-2)
    with pytest.raises(ValueError, match="4 tokens of a prompt of 6, whose routing is of all of them"):
        model(input_ids=IDS[:, 4:5], past_key_values=cache)
    cache = hf.StaticCache(config=model.config, max_cache_len=12)
    model(input_ids=IDS, past_key_values=cache)
    cache.reset()
    with model.disable_adapter():
        model(input_ids=IDS.flip(0), past_key_values=cache)
    with pytest.raises(ValueError, match="filled without this adapter"):
        model(input_ids=IDS[:, :1], past_key_values=cache)


def test_a_layer_that_runs_twice():
    """Of its routings in the prompt's forward only the last one would be kept."""
    model = build()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model = adapt(model, target_modules=["q_proj", "up_proj"])
    model(input_ids=IDS)
    with pytest.raises(ValueError, match=r"up_proj runs more than once in a forward.*leave it out of target_modules"):
        model.generate(input_ids=IDS, max_new_tokens=3, eos_token_id=None)


def test_hidden_states_that_begin_with_the_tokens():
    """XLNet's are [L, B, d]: each token would become an instance."""
    sizes = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48, "vocab_size": 96}
    model = adapt(hf.XLNetModel(hf.XLNetConfig(**sizes)), task_type=None)
    with pytest.raises(ValueError, match=r"gets an input of shape \(6, 2, 32\), the forward's tokens are \(2, 6\)"):
        model(input_ids=IDS)


def test_a_cache_beside_an_input_without_tokens():
    cache = hf.DynamicCache()
    cache.update(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4), 0)
    named = {"past_key_values": cache}
    forward_pass = ForwardPass(None, named, ModelInputs(), False, find_past(named, None))
    with pytest.raises(ValueError, match=r"decoder of layers\.0\.q has 3 tokens in its cache, and got neither"):
        forward_pass.prepare(["layers.0.q"], "default", ConditionalMixLoRAConfig(), torch.zeros(2, 1, 4))


def test_generation_in_training_mode_with_checkpointing():
    """transformers up to 5.23 turns the cache off then; 5.24 keeps it, and the answer is that of evaluation mode."""
    model, options = adapt(build()), {"max_new_tokens": 3, "eos_token_id": None}
    expected = model.generate(input_ids=IDS, **options)
    model.train().gradient_checkpointing_enable()
    try:
        answer = model.generate(input_ids=IDS, **options)
    except ValueError as error:
        assert "Call model.eval() before model.generate()" in str(error)
    else:
        assert Version(hf.__version__) >= Version("5.24")
        assert torch.equal(answer, expected)


def test_a_head_that_gets_the_last_token_alone():
    """generate() asks for the logits of one token: the head's mean over the prompt cannot be computed from it."""
    model = adapt(build(), target_modules=["lm_head"]).eval()
    assert model(input_ids=IDS).logits.isfinite().all()
    for call in (lambda: model(input_ids=IDS, logits_to_keep=1), lambda: model.generate(input_ids=IDS)):
        with pytest.raises(ValueError, match=r"lm_head gets an input of shape \(2, 1, .*leave this layer out"):
            call()


def test_rows_that_had_another_adapter_in_the_prompt():
    model, token = adapt(build()), IDS[:, :1]
    names = ["default", "__base__"]
    for later, message in (
        ({}, "filled for 1 rows, the forward has 2"),
        (
            {"adapter_names": names[::-1]},
            r"'default' had the rows \(0,\) when the cache was filled, and has \(1,\) now",
        ),
    ):
        with torch.no_grad():
            cache = model(input_ids=IDS, adapter_names=names, use_cache=True).past_key_values
            kept = copy.deepcopy(cache)
            with pytest.raises(ValueError, match=message):
                model(input_ids=token, past_key_values=cache, **later)
            found = model(input_ids=token, past_key_values=kept, adapter_names=names).logits[0]
            cache = model(input_ids=IDS[:1], use_cache=True).past_key_values
            assert torch.allclose(found, model(input_ids=token[:1], past_key_values=cache).logits[0], atol=1e-5)


def test_generation_without_a_cache_in_training_mode():
    with pytest.raises(ValueError, match="MixLoRA cannot tell which of them are the prompt"):
        adapt(build()).train().generate(input_ids=IDS, use_cache=False, max_new_tokens=3, eos_token_id=None)


def test_fewer_task_embeddings_than_instances():
    """Only for beams and returned sequences is one repeated, and then row by row."""
    model, task = adapt(build(), routing="task", task_dim=4), torch.randn(2, 4)
    four = {"input_ids": IDS.repeat(2, 1)}
    packed = {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])}
    for batch in (four, packed):
        with pytest.raises(ValueError, match=r"task must have the shape .* with B=4"):
            model(**batch, task_embedding=task)
    with task_embedding(model, task):
        with pytest.raises(ValueError, match=r"task must have the shape .* with B=4"):
            model(**packed)
        repeated = model(**four).logits
    assert torch.equal(repeated, model(**four, task_embedding=task[[0, 0, 1, 1]]).logits)
