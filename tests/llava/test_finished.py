"""A run that is finished is not trained further, and its adapter is in its place."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mixlora_llava.example import digits
from mixlora_llava.model import small
from mixlora_llava.model.load import TASKS
from mixlora_llava.training import train

from .test_train import settings, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    digits.write(folder / "data", per_task=8, held_out=4, copies=1)
    small.save(*small.small_llava(digits.texts(), width=24, layers=2), folder / "base")
    return folder


class KilledAtTheEnd(TrainerCallback):
    """Ends a run as a kill does between its last checkpoint and the adapter in its output folder."""

    def on_train_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_a_finished_run_is_not_trained_further(folder, capsys):
    """Its rate is constant, so that one more step would change the weights. The last step is no multiple of the steps
    between checkpoints."""
    given = settings(folder, "finished", training={"max_steps": 3, "lr_scheduler_type": "constant"})
    first = train.train(given)
    output = folder / "finished"
    before = weights(output)
    capsys.readouterr()
    for half in (None, b"half", b""):  # as it was left; killed while the adapter was written; killed before
        if half is not None:
            (output / "adapter_model.safetensors").write_bytes(half)
        if half == b"":
            (output / "adapter_model.safetensors").unlink()
        assert train.train(given) == first
        assert "the run is finished" in (said := capsys.readouterr().out) and "checkpoint-3 is its end" in said
        after = weights(output)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert not list(output.glob("*.part"))


@pytest.mark.slow
def test_a_run_that_is_killed_before_its_adapter_is_saved_has_it_when_it_is_repeated(folder):
    """Routing by task, so that the adapter has a second file."""
    changes = {"method": "mixlora_task", "task_definitions": str(folder / "data/definitions.json")}
    changes["training"] = {"num_train_epochs": 1, "max_steps": -1, "lr_scheduler_type": "constant"}
    whole, late = settings(folder, "in time", **changes), settings(folder, "late", **changes)
    train.train(whole)
    with pytest.raises(KeyboardInterrupt):
        train.train(late, callbacks=[KilledAtTheEnd()])
    assert not (folder / "late/adapter_model.safetensors").exists()
    train.train(late)
    for name in ("adapter_model.safetensors", TASKS):
        one, other = load_file(folder / "in time" / name), load_file(folder / "late" / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (folder / "late/adapter_config.json").read_text() == (folder / "in time/adapter_config.json").read_text()
