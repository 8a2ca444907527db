"""Mistakes on the command line get one line, the status of wrong arguments, and no work before it."""

import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import save_file

from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_llava.analysis import prompts
from mixlora_llava.command.main import main
from mixlora_llava.data.conversation import TEMPLATES
from mixlora_llava.example import digits
from mixlora_llava.model import generate, small
from mixlora_llava.model.load import TASKS, load_llava
from mixlora_llava.model.patch import patch_llava
from mixlora_llava.refusal import Refusal
from mixlora_llava.training.remembered import remember
from mixlora_llava.training.settings import Settings


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A LLaVA and its data, and adapters that route by instance, by task, and not at all."""
    folder = tmp_path_factory.mktemp("mistakes")
    digits.write(folder / "data", per_task=2, held_out=2, copies=1)
    small.save(*small.small_llava(digits.texts(), width=24, layers=2), folder / "base")
    configs = {
        "mixlora": ConditionalMixLoRAConfig(r=2, num_factors=4, task_type="CAUSAL_LM"),
        "by_task": ConditionalMixLoRAConfig(r=2, num_factors=4, routing="task", task_dim=24, task_type="CAUSAL_LM"),
        "lora": LoraConfig(r=2, task_type="CAUSAL_LM"),
    }
    for name, config in configs.items():
        patch_llava(load_llava(folder / "base")[0], config).model.save_pretrained(folder / name)
    save_file({"side": torch.ones(24)}, folder / "by_task" / TASKS)
    (folder / "empty.jsonl").write_text("")
    return folder


MODEL = "--model base --template bare"
ASKED = f"{MODEL} --questions data/eval/side.jsonl"
WHOLE = f"{ASKED} --images data/images"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"evaluate {ASKED} --images nope --output out", "--images must be a folder, and nope is missing"),
        (f"evaluate {ASKED} --images empty.jsonl --output out", "--images must be a folder, and empty.jsonl is a file"),
        (f"report {ASKED} --images nope --adapter mixlora", "--images must be a folder, and nope is missing"),
        (f"selection {ASKED} --images nope --adapter mixlora --output out", "--images must be a folder"),
        ("evaluate --pope nope nope2", "--pope must be a file, and nope is missing"),
        ("evaluate --mme nope", "--mme must be a folder, and nope is missing"),
        (f"evaluate {WHOLE} --output out --task-definitions data", "--task-definitions must be a file, and data is a"),
        (f"evaluate {WHOLE} --output data/train.json", "data/train.json is a file: give another folder"),
        (f"evaluate {WHOLE} --output data/train.json/out", "data/train.json is a file: give another folder"),
        (f"evaluate {WHOLE} --output out --batch-size 0", "--batch-size must be at least 1, got 0"),
        (f"evaluate {WHOLE} --output out --max-new-tokens 0", "--max-new-tokens must be at least 1, got 0"),
        (f"evaluate {WHOLE} --output out --device foo", "--device must be a torch device of this machine, got 'foo'"),
        (f"evaluate {WHOLE} --output out --device cuda:99", "--device must be a torch device of this machine"),
        (f"evaluate {WHOLE} --output out --device meta", "--device must be a torch device that computes, got 'meta'"),
        (f"evaluate {WHOLE} --output out --judge ./nope", "missing: the judge ./nope"),
        (f"evaluate {WHOLE} --output out --judge base", "base holds no judge"),
        (f"evaluate {MODEL} --questions empty.jsonl --images data/images --output out", "holds no questions"),
        (f"evaluate {WHOLE} --output out --task-definitions data/definitions.json", "an adapter that routes by task"),
        (f"evaluate {MODEL} --questions data/eval --images data/images --adapter by_task --output out",
         "no embedding of the tasks digit_name, "),
        (f"chat {MODEL} --image i --prompt p --max-new-tokens -1", "--max-new-tokens must be at least 1, got -1"),
        (f"chat {MODEL} --image i --prompt p --task side", "--task needs --adapter"),
        (f"chat {MODEL} --image digit.png --prompt p --task side --adapter mixlora", "--task is for an adapter with"),
        (f"report {WHOLE} --adapter mixlora --batch-size 0", "--batch-size must be at least 1, got 0"),
        (f"report {WHOLE} --adapter mixlora --per-task 0", "--per-task must be at least 1, got 0"),
        (f"report {MODEL} --questions empty.jsonl --images data/images --adapter mixlora", "holds no questions"),
        (f"report {MODEL} --questions data/eval/digit_name.jsonl --images data/images --adapter by_task",
         "no embedding of the tasks digit_name, only of side: leave their questions out"),
        (f"report {WHOLE} --adapter lora", "the adapter does not route"),
        (f"selection {WHOLE} --adapter mixlora --output out --layers 1 7", "the adapter has the layers 0, 1, got 7"),
        ("interference --config tuning.yaml --adapter lora --output out --batches 0", "--batches must be at least 1"),
        ("interference --config tuning.yaml --adapter lora --output out --batch-size 0", "--batch-size must be at lea"),
        ("interference --config lost.yaml --adapter lora --output out", "missing: data/lost.json (data)"),
        ("train --config zero.yaml", "training.per_device_train_batch_size: Input should be greater than or equal"),
        ("train --config odd.yaml", "training: "),
        ("train --config tuning.yaml --output data/train.json", "output must be a folder, and data/train.json is a"),
        ("study run --workers 0 --quick", "--workers must be at least 1, got 0"),
        ("study run --minutes 0 --quick", "--minutes must be a number above 0, got 0.0"),
        ("convert nope out", "source must be a folder, and nope is missing"),
        ("convert nope out --back", "source must be a folder, and nope is missing"),
        ("convert mixlora empty.jsonl --back", "target must be a folder, and empty.jsonl is a file"),
        ("example --output empty.jsonl", "--output must be a folder, and empty.jsonl is a file"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line(place, line, message, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {"model": "base", "data": "data/train.json", "images": "data/images", "output": "out", "template": "bare"}
    files = {
        "tuning": given,
        "lost": given | {"data": "data/lost.json"},
        "zero": given | {"training": {"per_device_train_batch_size": 0}},
        "odd": given | {"training": {"use_cpu": True, "logging_steps": 0}},
    }
    for name, settings in files.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    (place / "digit.png").write_bytes(next((place / "data/images/test").iterdir()).read_bytes())
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]  # before it there may be a bar for the model's weights
    assert stopped.value.code == 2 and said.out == "" and "Traceback" not in said.err
    assert last.startswith(f"mixlora {line.split()[0]}: error: ") and message in last
    assert not (place / "out").exists() or not list((place / "out").glob("*.json*"))


@pytest.mark.parametrize(
    "training", [{"gradient_accumulation_steps": 0}, {"num_train_epochs": 0}, {"per_device_train_batch_size": -1}]
)
def test_settings_refuse_numbers_that_no_training_can_have(training):
    given = {"model": "m", "data": "d", "images": "i", "output": "o"}
    with pytest.raises(ValueError, match=next(iter(training))):
        Settings(**given, training=training)
    assert Settings(**given, training={"num_train_epochs": 0.5}).training == {"num_train_epochs": 0.5}


def test_help_answers_whatever_stands_before_it(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--images", "nope", "--batch-size", "0", "--help"])
    said = capsys.readouterr()
    assert stopped.value.code == 0 and said.out.startswith("usage: ") and said.err == ""


def test_an_adapter_is_asked_with_the_template_of_its_training(place, tmp_path, monkeypatch, capsys, caplog):
    """The record of a training is in the folder of the adapter, or above that of a checkpoint."""
    monkeypatch.chdir(place)
    shutil.copytree("mixlora", "trained/checkpoint-4", dirs_exist_ok=True)
    shutil.copytree("mixlora", "trained", dirs_exist_ok=True)
    given = Settings(model="base", data="d", images="i", output="trained", template="bare")
    remember(given, place / "trained", resumes=False)
    systems = {"v1": TEMPLATES["v1"].system, "llava_v1": TEMPLATES["llava_v1"].system, "bare": "USER:"}

    def asked_with(adapter, *template):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        files = ["--questions", "data/eval/side.jsonl", "--images", "data/images", "--output", str(output)]
        line = ["evaluate", "--model", "base", "--adapter", adapter, *files, "--max-new-tokens", "1", *template]
        main(line)
        prompt = json.loads((output / "side.jsonl").read_text().splitlines()[0])["prompt"]
        return next(name for name, system in systems.items() if prompt.startswith(system))

    assert asked_with("trained") == asked_with("trained/checkpoint-4") == "bare" and "was trained" not in caplog.text
    assert asked_with("mixlora") == "v1"
    assert asked_with("trained", "--template", "llava_v1") == "llava_v1"
    assert "trained was trained with the template bare, and is asked with llava_v1" in caplog.text
    (place / "trained/settings.json").write_text('{"template": ["of another program"]}')
    assert asked_with("trained") == "v1"


@pytest.mark.parametrize("command", ["chat", "report", "selection"])
def test_every_command_takes_the_template_of_the_training(place, tmp_path, monkeypatch, command):
    monkeypatch.chdir(place)
    shutil.copytree("mixlora", tmp_path / "trained")
    (tmp_path / "trained/settings.json").write_text('{"template": "llava_v1"}')
    (place / "digit.png").write_bytes(next((place / "data/images/test").iterdir()).read_bytes())
    given = []

    def stop(question, template, image=True):
        given.append(template)
        raise Refusal("enough")

    monkeypatch.setattr(generate, "build_prompt", stop)
    monkeypatch.setattr(prompts, "build_prompt", stop)
    asked = ["--image", "digit.png", "--prompt", "?"] if command == "chat" else WHOLE.split()[4:]
    output = ["--output", str(tmp_path / "out")] if command == "selection" else []
    with pytest.raises(SystemExit):
        main([command, "--model", "base", "--adapter", str(tmp_path / "trained"), *asked, *output])
    assert given == ["llava_v1"]


def test_good_values_are_taken(place, tmp_path, monkeypatch, capsys):
    """A device by name, one question at a time, and a folder below one that does not exist yet."""
    monkeypatch.chdir(place)
    line = f"evaluate {WHOLE} --batch-size 1 --max-new-tokens 1 --device cpu --adapter by_task"
    main([*line.split(), "--output", str(tmp_path / "new/out")])
    assert json.loads(capsys.readouterr().out)["tasks"]["side"]["count"] == 2
    assert len((tmp_path / "new/out/side.jsonl").read_text().splitlines()) == 2
