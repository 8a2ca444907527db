"""What the PEFT layer costs around the operation, in the time of a forward."""

import copy
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mixlora_kernels.op import mixlora_siblings
from mixlora_kernels.peft import layer, siblings

from .models import adapt, build

ROUNDS = 400  # the least of so many does not hang on what else the machine does


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another on a busy machine cost more than what is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_no_more_than_pefts_own_lora_layer(monkeypatch):
    """Both on the same layers of the same model, taking turns; the operation itself takes no time here, and
    LoRA's, on 8 tokens, next to none beside its calls."""
    base = build()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    models = {
        "base": base.train(),
        "lora": get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=targets, lora_dropout=0.05)).train(),
        "mixlora": adapt(base, target_modules=targets).train(),
    }
    results, adapted = {}, set()

    def remembered(x, bases, factors, *args, **kwargs):
        keys = tuple(id(one.lora_A) for one in factors)
        if keys not in results:
            results[keys] = mixlora_siblings(x, bases, factors, *args, **kwargs)
            adapted.update(keys)
        return results[keys]

    for caller in (layer, siblings):
        monkeypatch.setattr(caller, "mixlora_siblings", remembered)
    batch = {"input_ids": torch.randint(3, 90, (2, 4)), "attention_mask": torch.ones(2, 4), "use_cache": False}
    times = dict.fromkeys(models, float("inf"))
    for _ in range(ROUNDS):
        for name, model in models.items():
            times[name] = min(times[name], _time(lambda model=model: model(**batch)))
    assert len(adapted) == 14 and len(results) == 8  # every layer, and no other; siblings together
    # The remembered output also spares the frozen product, which the base model has: count it for MixLoRA.
    x, frozen = torch.randn(2, 4, 32), base.model.layers[0].self_attn.q_proj
    product = min(_time(lambda: frozen(x)) for _ in range(200))
    lora = (times["lora"] - times["base"]) / len(adapted)
    ours = (times["mixlora"] - times["base"]) / len(adapted) + product
    assert ours <= lora, f"{ours * 1e6:.1f} us a layer, LoRA {lora * 1e6:.1f} us"


def _time(call) -> float:
    """Of this thread alone, in seconds: what others do on the machine meanwhile does not count."""
    start = time.thread_time()
    call()
    return time.thread_time() - start
