"""The training loops of transformers and TRL around an adapted model."""

import copy
import warnings

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from mixlora_kernels.peft import ConditionalMixLoRAConfig

from ..cases import mostly_slow
from .models import FAMILIES, adapt, build, pad, prompts, relative, trained

STEPS, STOP = 6, 3


def examples(image_tokens: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for seed in range(12):
        length = int(torch.randint(4, 9, (1,), generator=generator))
        tokens = prompts(1, lengths=(length,), image_tokens=image_tokens, seed=seed)[0]
        rows.append({"input_ids": tokens, "labels": torch.cat((torch.full((2,), -100), tokens[2:]))})
    return rows


def collate(rows: list[dict]) -> dict:
    ids, mask = pad([row["input_ids"] for row in rows], "right")
    labels, _ = pad([row["labels"] for row in rows], "right", value=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == STOP


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=STOP,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", mostly_slow([False, True], 1), ids=["", "checkpointed"])
def test_an_interrupted_run_that_resumes_ends_the_same(tmp_path, checkpointing):
    base = build()
    options = {"gradient_checkpointing": checkpointing}
    runs = []
    for folder in ("whole", "cut"):
        model = adapt(copy.deepcopy(base), pool="prompt", dropout=0.1)
        args = arguments(tmp_path / folder, **options)
        callbacks = [Interrupt()] if folder == "cut" else []
        trainer = Trainer(model, args, train_dataset=examples(), data_collator=collate, callbacks=callbacks)
        trainer.train()
        runs.append(model)
    assert trainer.state.global_step == STOP
    start = trained(adapt(copy.deepcopy(base)))
    fresh = adapt(copy.deepcopy(base), pool="prompt", dropout=0.1)
    with torch.no_grad():
        for parameter in trained(fresh).values():
            parameter.zero_()  # all that it knows comes from the checkpoint
    trainer = Trainer(
        fresh, arguments(tmp_path / "cut", **options), train_dataset=examples(), data_collator=collate
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    for name, parameter in trained(fresh).items():
        assert torch.equal(parameter, trained(runs[0])[name]), name
        assert not torch.equal(parameter, start[name]), name


def sft(folder, rows, **options):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="TRL needs datasets")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 96)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="</s>"
    )
    args = trl.SFTConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, bf16=False, gradient_checkpointing=False, **{"max_length": 32, **options},
    )  # fmt: skip
    seen = []

    class Noting(trl.SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(dict(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    config = ConditionalMixLoRAConfig(r=2, num_factors=6, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    trainer = Noting(
        build(), args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, peft_config=config
    )
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize(
    "options",
    mostly_slow([{}, {"packing": True}, {"padding_free": True, "max_length": None}], 0),
    ids=["rows", "packing", "padding-free"],
)
def test_trl(tmp_path, options):
    """Instances are told apart as TRL collates them, by a mask or by positions."""
    rows = [{"input_ids": row["input_ids"].tolist()} for row in examples()]
    with warnings.catch_warnings():
        # TRL warns that only flash attention separates packed rows. Here positions do.
        warnings.simplefilter("ignore")
        trainer, seen = sft(tmp_path, rows, **options)
    start = adapt(build(), init_weights=True)
    assert trainer.model.peft_config["default"].peft_type == "CONDITIONAL_MIXLORA"
    changed = [name for name, parameter in trained(trainer.model).items() if "lora_B" in name and parameter.any()]
    assert len(changed) == sum("lora_B" in name for name in trained(start))
    model, inputs = trainer.model.eval(), {name: value for name, value in seen[0].items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    if not options:
        assert "attention_mask" in inputs
        return
    assert "attention_mask" not in inputs and len(inputs["input_ids"]) == 1
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 1
    for a, b in zip(starts, [*starts[1:], inputs["input_ids"].shape[1]]):
        alone = model(input_ids=inputs["input_ids"][:, a:b], use_cache=False).logits[0]
        assert relative(logits[0, a:b], alone) < 1e-5  # float32 sums over other lengths


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, 0))
def test_each_family_learns_saves_loads_and_generates(tmp_path, family):
    from peft import PeftModel

    kind = FAMILIES[family]
    base = build(family)
    model = adapt(base, init_weights=True)
    ids, mask = pad(prompts(2, image_tokens=kind.image_tokens), "left")
    torch.manual_seed(0)
    batch = {"input_ids": ids, "attention_mask": mask, **kind.images(2)}
    if family == "qwen2_5_vl":
        batch["mm_token_type_ids"] = (ids == 95).long()
    optimizer = torch.optim.Adam(trained(model).values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.train()(**batch, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    answers = [some.generate(**batch, max_new_tokens=4, do_sample=False) for some in (model, loaded)]
    assert torch.equal(*answers)
