"""Predictions: their format, resuming, batches against single questions, judges, MMAvg, chat."""

import json
import math

import pytest
import torch
from peft import LoraConfig
from PIL import Image

from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_kernels.peft.side_information import find_side_information
from mixlora_llava.analysis import selection
from mixlora_llava.checkpoints import convert
from mixlora_llava.command.main import main
from mixlora_llava.data.images import load_image
from mixlora_llava.example import digits
from mixlora_llava.model import generate, small
from mixlora_llava.model.digest import model_digest
from mixlora_llava.model.load import load_adapter, load_llava
from mixlora_llava.model.patch import patch_llava
from mixlora_llava.scoring import predict, scores
from mixlora_llava.scoring.judge import LanguageModelJudge


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    digits.write(folder / "data", per_task=4, held_out=6, copies=1)
    small.save(*small.small_llava(digits.texts(), width=24, layers=2), folder / "base")
    model, _ = load_llava(folder / "base")
    patched = patch_llava(
        model, ConditionalMixLoRAConfig(r=2, num_factors=6, init_weights=False, task_type="CAUSAL_LM")
    )
    with torch.no_grad():  # strong enough to change what is said
        for name, parameter in patched.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(5)
    patched.model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def adapted(folder):
    model, processor = load_llava(folder / "base")
    return load_adapter(model, folder / "adapter")[0], processor


def test_rows_have_the_released_fields(folder, adapted, tmp_path):
    questions = predict.read_questions(folder / "data/eval/side.jsonl")
    out = tmp_path / "side.jsonl"
    rows = predict.predict(*adapted, questions, folder / "data/images", out, template="bare", max_new_tokens=3)
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    assert set(rows[0]) == {
        "question_id", "prompt", "predict", "target", "image_path", "answer_id", "model_id", "metadata",
    }  # fmt: skip
    assert rows[0]["prompt"] == "USER: <image>\nIs the digit on the left or on the right? ASSISTANT:"
    assert [row["target"] for row in rows] == [question["target"] for question in questions]


def test_a_batch_says_what_each_question_alone_says(folder, adapted, tmp_path):
    model, processor = adapted
    files = sorted((folder / "data/eval").glob("*.jsonl"))
    questions = [predict.read_questions(file)[0] for file in files]  # prompts of several lengths: padding
    options = {"template": "bare", "max_new_tokens": 6}
    images = folder / "data/images"
    batch = predict.predict(model, processor, questions, images, tmp_path / "a.jsonl", batch_size=7, **options)
    alone = predict.predict(model, processor, questions, images, tmp_path / "b.jsonl", batch_size=1, **options)
    assert [row["predict"] for row in batch] == [row["predict"] for row in alone]
    base, processor = load_llava(folder / "base")
    untuned = predict.predict(base, processor, questions, images, tmp_path / "c.jsonl", **options)
    assert [row["predict"] for row in untuned] != [row["predict"] for row in batch]


def test_a_stopped_run_goes_on(folder, adapted, tmp_path):
    questions = predict.read_questions(folder / "data/eval/pope_pop.jsonl")
    out, images = tmp_path / "pope_pop.jsonl", folder / "data/images"
    whole = predict.predict(*adapted, questions, images, out, template="bare", max_new_tokens=2, batch_size=5)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:4]) + lines[4][:30])  # stopped within a line
    again = predict.predict(*adapted, questions, images, out, template="bare", max_new_tokens=2, batch_size=5)
    assert again[:4] == whole[:4] and len(out.read_text().splitlines()) == len(questions)
    assert [row["predict"] for row in again] == [row["predict"] for row in whole]
    with pytest.raises(ValueError, match="answers to other questions"):
        predict.predict(*adapted, questions[1:], images, out, template="bare")


def test_answers_of_another_model_are_not_gone_on_with(folder, adapted, tmp_path):
    """One weight, one setting of the adapter, the adapter switched off, another prompt: each is another's answers."""
    model, processor = adapted
    questions = predict.read_questions(folder / "data/eval/pope_pop.jsonl")
    out, options = tmp_path / "pope_pop.jsonl", {"template": "bare", "max_new_tokens": 2, "batch_size": 5}
    rows = predict.predict(model, processor, questions, folder / "data/images", out, model_id="first", **options)
    assert {row["metadata"]["model_digest"] for row in rows} == {model_digest(model)}
    lines = out.read_text().splitlines(keepends=True)

    def go_on(expected: str | None, **other):
        out.write_text("".join(lines[:5]))
        if expected is None:
            predict.predict(model, processor, questions, folder / "data/images", out, **options | other)
            assert len(out.read_text().splitlines()) == len(lines)
            return
        with pytest.raises(ValueError, match=expected):
            predict.predict(model, processor, questions, folder / "data/images", out, **options | other)
        assert out.read_text() == "".join(lines[:5])

    go_on(None)
    weight = next(parameter for name, parameter in model.named_parameters() if name.endswith("router_B"))
    with torch.no_grad():
        weight[0, 0] += 1e-6
    go_on(r"another model or adapter \(first; digest")
    with torch.no_grad():
        weight[0, 0] -= 1e-6
    model, _ = load_adapter(load_llava(folder / "base")[0], folder / "adapter")  # the same again, from its files
    go_on(None)
    model.peft_config["default"].decode = "token"
    go_on("another model or adapter")
    model.peft_config["default"].decode = "prompt"
    with model.disable_adapter():
        go_on("another model or adapter")
    go_on("other questions", template="v1")
    lines[0] = lines[0].replace(', "model_digest": "' + model_digest(model) + '"', "")
    go_on("answers of another model|an unknown model")


def test_a_digest_knows_dtypes_and_needs_values(folder):
    model, _ = load_llava(folder / "base")
    before = model_digest(model)
    assert model_digest(load_llava(folder / "base")[0]) == before
    assert model_digest(load_llava(folder / "base", torch.bfloat16)[0]) != before
    with pytest.raises(ValueError, match="on the meta device"):
        model_digest(model.to("meta"))


def test_a_bad_image_is_counted_as_wrong(folder, adapted, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    Image.new("CMYK", (16, 16)).save(tmp_path / "ink.jpg")
    questions = [
        {"unique_id": i, "image_path": name, "prompt": "Describe the image.", "target": "a"}
        for i, name in enumerate(["broken.png", "ink.jpg"])
    ]
    rows = predict.predict(*adapted, questions, tmp_path, tmp_path / "out.jsonl", template="bare", max_new_tokens=2)
    assert rows[0]["predict"] == "" and "broken.png" in rows[0]["metadata"]["error"]
    assert "error" not in rows[1]["metadata"]
    assert scores.score_task("x", rows, lambda rows: [False, True]) == {
        "accuracy": 50.0, "count": 2, "unclear": 0, "errors": 1,
    }  # fmt: skip


def test_recorded_choices_are_those_that_each_answer_is_made_with(folder, adapted):
    """In padded batches of several tasks, against each question alone; both pools of every layer."""
    model, processor = adapted
    files = sorted((folder / "data/eval").glob("*.jsonl"))
    questions, images = {file.stem: predict.read_questions(file)[:3] for file in files[:3]}, folder / "data/images"
    found = selection.record(model, processor, questions, images, template="bare", batch_size=2)
    rows = [(task, row) for task, of_task in questions.items() for row in of_task]
    assert found.tasks == [task for task, _ in rows] and found.num_factors == 6
    for number, (_, row) in enumerate(rows):
        prompt = generate.build_prompt(row["prompt"], "bare")
        generate.answer(model, processor, [prompt], [load_image(images / row["image_path"])], max_new_tokens=3)
        alone = find_side_information(model).last
        assert len(alone) == 14
        for (name, _), routing in alone.items():
            for pool, chosen in (("A", routing.index_a), ("B", routing.index_b)):
                assert found.chosen[name, pool][number].tolist() == chosen[0].tolist(), (name, pool)


def test_factors_are_refused_of_lora_before_the_answer(folder, tmp_path, capsys):
    model, _ = load_llava(folder / "base")
    patch_llava(model, LoraConfig(r=2, task_type="CAUSAL_LM")).model.save_pretrained(tmp_path)
    image = next((folder / "data/images/test").iterdir())
    asked = ["--model", str(folder / "base"), "--adapter", str(tmp_path), "--image", str(image), "--prompt", "?"]
    with pytest.raises(SystemExit):
        main(["chat", *asked, "--factors", "--template", "bare"])
    said = capsys.readouterr()
    assert said.out == "" and "no MixLoRA layers" in said.err


def test_adapters_that_average_padding_are_asked_one_by_one(folder, tmp_path, caplog):
    model, processor = load_llava(folder / "base")
    patched = patch_llava(model, ConditionalMixLoRAConfig.published(r=2, num_factors=4, task_type="CAUSAL_LM"))
    questions = predict.read_questions(folder / "data/eval/side.jsonl")[:2]
    predict.predict(
        patched.model, processor, questions, folder / "data/images", tmp_path / "x.jsonl", template="bare",
        max_new_tokens=2,
    )  # fmt: skip
    assert "one by one" in caplog.text


def test_any_causal_model_can_judge(folder):
    """The judge is asked in padded batches; a model that always says one token shows that its words are read."""
    model, processor = load_llava(folder / "base")
    causal = model.model.language_model
    from transformers import LlamaForCausalLM

    judge_model = LlamaForCausalLM(causal.config)
    tokenizer = processor.tokenizer
    yes = tokenizer.convert_tokens_to_ids("yes")
    with torch.no_grad():  # every logit but one is zero, whatever the state
        judge_model.lm_head.weight.zero_()
        judge_model.model.norm.weight.zero_()
        judge_model.lm_head.bias = torch.nn.Parameter(torch.zeros(causal.config.vocab_size))
        judge_model.lm_head.bias[yes] = 1.0
    rows = [{"prompt": "red " * n, "target": "red", "predict": "red"} for n in (1, 5, 3)]
    assert LanguageModelJudge(judge_model, tokenizer, batch_size=2)(rows) == [True, True, True]


def test_commands(folder, adapted, tmp_path, capsys):
    model = ["--model", str(folder / "base"), "--adapter", str(folder / "adapter"), "--template", "bare"]
    files = ["--questions", str(folder / "data/eval/side.jsonl"), "--images", str(folder / "data/images")]
    main(["evaluate", *model, *files, "--output", str(tmp_path), "--max-new-tokens", "2"])
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "scores.json").read_text()) and report["tasks"]["side"]["count"] == 6
    image = next((folder / "data/images/test").iterdir())
    main(["chat", *model, "--image", str(image), "--prompt", "Is it odd?", "--max-new-tokens", "4", "--factors"])
    lines = capsys.readouterr().out.splitlines()
    chosen = [line for line in lines if line.startswith("model.language_model.layers.")]
    assert len(chosen) == 14 and len(lines) > 14
    first = json.loads(chosen[0].partition(": A ")[2].partition(", B")[0])
    assert len(set(first)) == 2 and set(first) <= set(range(6))
    main(["report", *model, *files, "--batch-size", "4", "--output", str(tmp_path / "routing")])
    said, found = capsys.readouterr().out, json.loads((tmp_path / "routing/routing.json").read_text())
    assert said.startswith("6 questions of 1 tasks, 2 of 6 factors chosen\n") and len(found["layers"]) == 28
    assert all(f"\n{key} " in said for key in found["layers"])
    for row in found["layers"].values():
        assert sum(row["usage"]) == 12 and row["unused"] == row["usage"].count(0)
        assert row["most_used"] == sum(sorted(row["usage"])[-2:]) / 12 and 0 < row["entropy"] <= math.log(6) + 1e-6
    chosen = predict.read_tasks(folder / "data/eval/side.jsonl", 100)
    alone = selection.record(*adapted, chosen, folder / "data/images", template="bare", batch_size=1)
    usage = {key: row["side"] for key, row in alone.usage().items()}
    assert usage == {key: row["usage"] for key, row in found["layers"].items()}
    assert (tmp_path / "routing/routing.png").stat().st_size > 5000
    (tmp_path / "no.png").write_text("no")
    with pytest.raises(SystemExit):
        main(["chat", *model, "--image", str(tmp_path / "no.png"), "--prompt", "?"])
    assert "no.png: not an image" in capsys.readouterr().err


def test_a_converted_checkpoint_answers(tmp_path, folder):
    """From released files to an answer: conversion, projector and generation fit together."""
    from .tiny import released_checkpoint, tiny_llava

    released_checkpoint(tmp_path / "released")
    convert.to_adapter(tmp_path / "released", tmp_path / "adapter")
    model, _ = load_adapter(tiny_llava(), tmp_path / "adapter")
    ids = torch.tensor([[1, 3, 3, 3, 3, 7]])
    out = model.generate(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 6
