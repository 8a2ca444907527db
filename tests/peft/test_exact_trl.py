"""TRL's trainers around pool="prompt": the log-probabilities they train on are those that sampling has."""

import warnings

import pytest
import torch

from mixlora_kernels.peft import ConditionalMixLoRAConfig

from .models import build
from .test_exact_pooling import TOLERANCE, decoded, log_probs

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets", reason="TRL needs datasets")

PROMPTS = ["w5 w9 w30 w31", "w40 w8 w77", "w12 w13 w14 w15 w16", "w60 w61 w9"]
ANSWERS = ["w20 w21 w22", "w23 w24", "w25 w26 w27 w28", "w29"]
OTHERS = ["w50", "w51 w52 w53 w54", "w55 w56", "w57 w58"]
COMMON = {
    "max_steps": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False,
    "gradient_checkpointing": False, "save_strategy": "no",
}  # fmt: skip


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 96)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", padding_side="left")


class Watch:
    """Compares every training forward's log-probabilities with those of decoding the answers token by token."""

    def __init__(self, temperature: float = 1.0):
        self.temperature, self.distances, self.answers = temperature, [], []

    def __call__(self, model, _args, kwargs, output):
        if not torch.is_grad_enabled() or not model.training:
            return
        ids, labels = kwargs["input_ids"], kwargs["labels"]
        found = output.log_probs if "log_probs" in output else log_probs(output.logits, ids)
        found = found.detach()[:, -(ids.shape[1] - 1) :]  # [B, L - 1]: of each token but the first
        for row, mask in enumerate(kwargs["attention_mask"].bool()):
            answer = (labels[row] != -100).nonzero().flatten()
            assert answer[0] >= 1 and len(answer) == answer[-1] - answer[0] + 1
            prompt = ids[row, : answer[0]][mask[: answer[0]]]
            tokens, scores = ids[row, answer], found[row, answer - 1]
            expected = decoded(model, prompt, tokens, self.temperature)
            self.distances.append((scores - expected).abs().max().item())
            self.answers.append((prompt.tolist(), tokens.tolist(), scores))


def train(kind, args, rows, watch, **options):
    torch.manual_seed(0)
    config = ConditionalMixLoRAConfig(r=2, num_factors=6, alpha=24, init_weights=False, task_type="CAUSAL_LM")
    trainer = kind(
        build(), args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer(),
        peft_config=config, **options,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "router" in name:
                parameter.normal_()
    if watch is not None:
        trainer.model.register_forward_hook(watch, with_kwargs=True)
    return trainer


def test_sft_tells_that_balance_has_no_effect(tmp_path):
    """The trainer's loss comes from log-probabilities. If that changed, or their name, there would be no warning."""
    rows, weights = [{"prompt": p + " ", "completion": a} for p, a in zip(PROMPTS, ANSWERS)], []
    args = trl.SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, max_length=32, **COMMON)
    for balance in (0.0, 100.0):
        trainer = train(trl.SFTTrainer, args, rows, None)
        trainer.model.peft_config["default"].balance = balance
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        assert any("from the log-probabilities" in str(one.message) for one in caught) == bool(balance)
        weights.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *weights))


def test_sft(tmp_path):
    rows = [{"prompt": p + " ", "completion": a} for p, a in zip(PROMPTS, ANSWERS)]
    args = trl.SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, max_length=32, **COMMON)
    watch = Watch()
    train(trl.SFTTrainer, args, rows, watch).train()
    assert len(watch.distances) == 8 and max(watch.distances) < TOLERANCE


def test_dpo(tmp_path):
    rows = [{"prompt": p, "chosen": " " + a, "rejected": " " + o} for p, a, o in zip(PROMPTS, ANSWERS, OTHERS)]
    args = trl.DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, max_length=32, **COMMON)
    watch = Watch()
    train(trl.DPOTrainer, args, rows, watch).train()
    assert len(watch.distances) == 16 and max(watch.distances) < TOLERANCE


def test_grpo(tmp_path):
    """What was sampled by generate() itself, with left-padded prompts, has the same log-probabilities in training."""
    temperature = 0.7
    args = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=5,
        temperature=temperature, beta=0.0, **{**COMMON, "max_steps": 1},  # sampled once, before the weights change
    )  # fmt: skip
    watch = Watch(temperature)
    trainer = train(
        trl.GRPOTrainer, args, [{"prompt": p} for p in PROMPTS], watch,
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
    )  # fmt: skip
    inner, sampled = trainer.model.base_model.model, {}
    generate = inner.generate

    def noting(*args, **kwargs):
        out = generate(*args, **kwargs, output_logits=True, return_dict_in_generate=True)
        logits = torch.stack(out.logits, 1).float() / temperature
        answers = out.sequences[:, -logits.shape[1] :]
        scores = logits.log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)
        for ids, answer, row in zip(out.sequences, answers.tolist(), scores):
            prompt = [token for token in ids[: -len(answer)].tolist() if token]
            sampled[tuple(prompt), tuple(answer)] = row
        return out.sequences

    inner.generate = noting
    trainer.train()
    assert len(watch.distances) == 4 and max(watch.distances) < TOLERANCE
    for prompt, answer, scores in watch.answers:
        (row,) = [row for (p, a), row in sampled.items() if p == tuple(prompt) and a[: len(answer)] == tuple(answer)]
        assert (scores - row[: len(answer)]).abs().max() < TOLERANCE
