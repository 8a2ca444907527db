"""The switch, the dry run, and that a run which was killed ends with the weights of one that was not."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mixlora_llava.command.main import main
from mixlora_llava.data.dataset import Collator
from mixlora_llava.example import digits
from mixlora_llava.example.resuming import train_until_killed
from mixlora_llava.model import small
from mixlora_llava.model.load import TASKS, load_llava
from mixlora_llava.training import estimate, prepare, train
from mixlora_llava.training.settings import METHODS, Settings
from mixlora_llava.training.train import LengthGrouped

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    digits.write(folder / "data", per_task=8, held_out=4, copies=1)
    small.save(*small.small_llava(digits.texts(), width=24, layers=2), folder / "base")
    return folder


def settings(folder, output, **changes):
    training = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2,
        "use_cpu": True, "disable_tqdm": True,
    } | changes.pop("training", {})  # fmt: skip
    given = {"model": str(folder / "base"), "data": str(folder / "data/train.json"), "output": str(folder / output)}
    given |= {"images": str(folder / "data/images"), "r": 2, "num_factors": 4, "template": "bare"}
    return Settings(**(given | {"training": training} | changes))


def weights(output):
    return load_file(output / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_every_method_trains_what_it_should(folder, method):
    task = {"task_definitions": str(folder / "data/definitions.json")} if "task" in method else {}
    report = train.train(settings(folder, method, method=method, **task))
    tensors = weights(folder / method)
    names = {name.rpartition("_proj.")[2] for name in tensors if ".layers." in name}
    router = {"lora_A", "lora_B", "router_A", "router_B", "router_AB"}
    expected = {
        "lora": {"lora_A.weight", "lora_B.weight"},
        "mixlora": router,
        "mixlora_tied": {"lora_A", "lora_B", "router_A"},
        "mixlora_unconditional": router - {"router_AB"},
        "mixlora_task": router,
        "mixlora_task_unconditional": router - {"router_AB"},
        "mixlora_random": {"lora_A", "lora_B"},
    }[method]
    assert {name.removeprefix("mixlora_adapter.") for name in names} == expected
    assert report["steps"] == 6 and report["bad_records"] == {}
    assert any("multi_modal_projector" in name for name in tensors)
    trained = [name for name, tensor in tensors.items() if "lora_B" in name and tensor.any()]
    assert len(trained) == 14  # lora_B starts at zero
    assert (folder / method / TASKS).is_file() == ("task" in method)
    assert report["loss"][6] < report["loss"][1]


@pytest.mark.slow
def test_an_adapter_that_routes_by_task_is_evaluated_analysed_and_asked(folder, tmp_path, capsys):
    definitions, base = str(folder / "data/definitions.json"), str(folder / "base")
    given = settings(folder, "tasks", method="mixlora_task", task_definitions=definitions)
    train.train(given)
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(vars(given)))
    (tmp_path / "more.json").write_text(
        json.dumps(json.loads(Path(definitions).read_text()) | {"pope_pop": "Say whether the image shows a digit."})
    )
    adapter, eval_folder = str(folder / "tasks"), folder / "data/eval"
    model = ["--model", base, "--adapter", adapter, "--template", "bare", "--images", str(folder / "data/images")]
    asked = [*model, "--output", str(tmp_path / "out"), "--max-new-tokens", "2"]
    with pytest.raises(SystemExit):  # it was not tuned on this task, and the task's embedding was not saved
        main(["evaluate", *asked, "--questions", str(eval_folder / "pope_pop.jsonl")])
    assert "no embedding of the tasks pope_pop" in capsys.readouterr().err
    main(["evaluate", *asked, "--questions", str(eval_folder), "--task-definitions", str(tmp_path / "more.json")])
    assert json.loads((tmp_path / "out/scores.json").read_text())["tasks"]["pope_pop"]["count"] == 8
    for file in eval_folder.glob("pope*"):
        file.unlink()
    main(
        ["selection", *model, "--questions", str(eval_folder), "--output", str(tmp_path / "chosen"), "--per-task", "4"]
    )
    chosen = np.load(tmp_path / "chosen/selection.npz")
    rows = chosen["model.language_model.layers.0.mlp.up_proj.A"].reshape(len(digits.TASKS), 4, 2)
    assert (rows == rows[:, :1]).all()  # by the task alone, whatever the image
    options = ["--config", str(tmp_path / "tasks.yaml"), "--adapter", adapter, "--batches", "2", "--batch-size", "3"]
    main(["interference", *options, "--output", str(tmp_path / "interference")])
    found = json.loads((tmp_path / "interference/interference.json").read_text())["tasks"]
    assert found["tasks"] == sorted(digits.TASKS) and len(found["groups"]) == 8
    assert all(row[i] == pytest.approx(1) for scores in found["groups"].values() for i, row in enumerate(scores))
    assert len(list((tmp_path / "interference").glob("*.png"))) == 5
    image = str(next((folder / "data/images/test").iterdir()))
    main(["chat", *model[:-2], "--image", image, "--prompt", "Is it odd?", "--task", "side", "--max-new-tokens", "2"])
    with pytest.raises(SystemExit):
        main(["chat", *model[:-2], "--image", image, "--prompt", "Is it odd?", "--task", "none"])
    assert "--task must be one of digit_name" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_weights(folder):
    """Two epochs of six steps: killed in the first, killed again in the second, across its shuffle."""
    changes = {"training": {"max_steps": 12, "save_steps": 2}}
    train.train(settings(folder, "whole", **changes))
    file = folder / "killed.yaml"
    file.write_text(yaml.safe_dump(vars(settings(folder, "killed", **changes))))
    for stop in (3, 9):
        train_until_killed(file, stop)
        assert train.last_checkpoint(folder / "killed").folder.name == f"checkpoint-{stop - 1}"
    assert not (folder / "killed" / "adapter_model.safetensors").exists()
    train.train(settings(folder, "killed", **changes))
    one, other = weights(folder / "whole"), weights(folder / "killed")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_processes_train_on_texts_and_images(folder):
    """The projector is trained, and batches without an image meet batches with one on the other process."""
    records = json.loads((folder / "data/pretraining.json").read_text())
    texts, pictures = ([row for row in records if ("image" in row) == kind][:24] for kind in (False, True))
    (folder / "mixed.json").write_text(json.dumps(texts + pictures))
    training = {"per_device_train_batch_size": 4, "gradient_checkpointing": True}
    given = settings(folder, "two", data=str(folder / "mixed.json"), training=training)
    (folder / "two.yaml").write_text(yaml.safe_dump(vars(given)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["mixlora_llava", "train", "--config", str(folder / "two.yaml")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'integration'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    before = load_file(folder / "base" / "model.safetensors")
    name = next(name for name in before if "projector.linear_1.weight" in name)
    trained = next(tensor for name, tensor in weights(folder / "two").items() if "projector.linear_1.weight" in name)
    assert not torch.equal(before[name], trained)


def test_a_half_written_checkpoint_is_not_used(folder):
    output = folder / "half"
    (output / "checkpoint-4").mkdir(parents=True)
    (output / "checkpoint-10").mkdir()
    (output / "checkpoint-4" / "trainer_state.json").write_text("{}")
    (output / "checkpoint-10" / "trainer_state.json").write_text('{"global')
    assert train.last_checkpoint(output).folder == output / "checkpoint-4"


@pytest.mark.slow
def test_goes_on_only_with_the_same_settings(folder):
    train.train(settings(folder, "same"))
    with pytest.raises(ValueError, match="r: 2, now 3"):
        train.train(settings(folder, "same", r=3))
    with pytest.raises(ValueError, match="already holds a run"):
        train.train(settings(folder, "same"), fresh=True)


def test_dry_run_prints_modules_parameters_memory_and_stops(folder, capsys):
    file = folder / "dry.yaml"
    file.write_text(yaml.safe_dump(vars(settings(folder, "dry", device_tflops=0.001))))
    main(["train", "--config", str(file), "--dry-run"])
    out = capsys.readouterr().out
    assert "model.language_model.layers.1.mlp.down_proj" in out and "model.vision_tower" not in out
    # per layer: q, k, v, o [24, 24]; gate, up [48, 24]; down [24, 48]; pools of 4, routers of 4, router_AB of 2 x 4
    per_layer = 4 * (4 * (24 + 24) + 16 * 24) + 2 * (4 * (24 + 48) + 16 * 24) + 4 * (48 + 24) + 16 * 48
    projector = 16 * 24 + 24 + 24 * 24 + 24
    assert f"trainable: {2 * per_layer + projector:,} of" in out
    assert "steps: 6" in out and "device hours" in out and "MiB" in out
    assert not (folder / "dry").exists()


def test_says_before_the_first_step_what_the_run_does(folder, capsys):
    """Three steps of an epoch's five batches of eight, in each of two epochs."""
    changes = {"training": {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}, "limit": 40}
    report = train.train(settings(folder, "said", **changes))
    out = capsys.readouterr().out
    assert report["steps"] == 6 and "steps: 6\n" in out and "trainable: " in out
    minutes, seconds = re.search(
        r"time: about ([\d.]+) minutes, from ([\d.]+) s measured for a batch of 8", out
    ).groups()
    assert float(minutes) == pytest.approx(float(seconds) * 6 * 2 / 60, abs=0.1)


def test_timing_a_batch_leaves_no_trace(folder):
    model, processor = load_llava(folder / "base")
    patched = prepare.patch(model, settings(folder, "none"))
    patched.model.eval()
    data = prepare.read_data(settings(folder, "none"), processor)
    random, values = torch.get_rng_state(), [p.clone() for p in patched.model.parameters()]
    found = estimate.measure(patched.model, Collator(0)([data[0], data[1]]), torch.device("cpu"))
    assert found["seconds"] > 0 and torch.equal(torch.get_rng_state(), random) and not patched.model.training
    assert all(p.grad is None and torch.equal(p, v) for p, v in zip(patched.model.parameters(), values))


def test_memory_is_counted(folder):
    """Parameters, gradients and AdamW's states are exact; they are what a step of it leaves."""
    patched = prepare.patch(load_llava(folder / "base")[0], settings(folder, "none"))
    needs = estimate.memory(patched.model, batch=2, tokens=10, checkpointing=False, activation_bytes=4)
    trained = [p for p in patched.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    assert needs["optimizer"] == sum(v.numel() * v.element_size() for v in states)
    assert needs["gradients"] == sum(p.grad.numel() * 4 for p in trained)
    assert needs["parameters"] == sum(p.numel() * 4 for p in patched.model.parameters())


@pytest.mark.slow
def test_tensorboard_has_every_loss(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError)
    report = train.train(settings(folder, "board", training={"report_to": "tensorboard"}))
    events = next((folder / "board").rglob("events.out.tfevents.*"))
    reader = accumulator.EventAccumulator(str(events.parent))
    reader.Reload()
    # The file's values are float32.
    assert {row.step: row.value for row in reader.Scalars("train/loss")} == pytest.approx(report["loss"], rel=1e-6)


def test_strict_stops_at_bad_records(folder):
    records = json.loads((folder / "data/train.json").read_text())
    (folder / "bad.json").write_text(json.dumps([*records, {"id": "lost", "image": "no.png", "conversations": []}]))
    with pytest.raises(ValueError, match="lost"):
        train.train(settings(folder, "strict", strict=True, data=str(folder / "bad.json")))


def test_routing_by_task_needs_the_task_of_each_record(folder):
    records = json.loads((folder / "data/train.json").read_text())
    nameless = {key: value for key, value in records[0].items() if key != "task_name"} | {"id": "nameless"}
    (folder / "nameless.json").write_text(json.dumps([*records[:7], nameless]))
    changes = {"method": "mixlora_task", "task_definitions": str(folder / "data/definitions.json")}
    with pytest.raises(ValueError, match="task_name in each record, these have none: nameless"):
        train.train(settings(folder, "nameless", **changes, data=str(folder / "nameless.json")))


def test_bad_records_do_not_stop_a_run_and_are_left_in_its_folder(folder):
    """One is found before the first step, one when it is trained on."""
    records = json.loads((folder / "data/train.json").read_text())
    whole = (folder / "data/images" / records[0]["image"]).read_bytes()
    (folder / "data/images/cut.png").write_bytes(whole[: len(whole) // 2])
    late = records[0] | {"id": "late", "image": "cut.png"}
    (folder / "some.json").write_text(json.dumps([*records[:7], late, {"id": "lost", "image": ["no.png"]}]))
    given = {"data": str(folder / "some.json"), "check_images": "header", "training": {"max_steps": 1}}
    report = train.train(settings(folder, "some", **given))
    expected = {"image is not the name of a file": ["lost"], "truncated or corrupt": ["late"]}
    assert report["steps"] == 1 and report["bad_records"] == expected
    assert json.loads((folder / "some" / train.BAD_RECORDS).read_text()) == expected


@pytest.mark.parametrize("count", [5, 8, 128, 131])
def test_batches_of_similar_length_in_an_order_of_seed_and_epoch(count):
    lengths = [5 if i % 2 else 50 for i in range(count)]
    lengths[3] = 99
    sampler = LengthGrouped(lengths, 8, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(count)) and first == list(LengthGrouped(lengths, 8, seed=1))
    assert 3 in first[:8]
    sampler.set_epoch(1)
    assert list(sampler) != first
    means = [sum(lengths[i] for i in first[start : start + 8]) / 8 for start in range(0, count - 7, 8)]
    mixed = sum(6 < mean < 49 for mean in means)
    assert mixed <= 5  # one for each of the four groups that are sorted, and the one with the longest record
    if count > 100:  # long and short batches take turns, instead of all long ones first
        assert sum(one > other for one, other in pairwise(means)) >= 2
        assert means != sorted(means, reverse=True)
