"""Forwards that cannot be routed as they are asked for: a clear error, and nothing of it is left."""

import copy

import pytest
import torch
from peft import inject_adapter_in_model

from mixlora_kernels.peft import ConditionalMixLoRAConfig, routing_report, task_embedding

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
