"""Check that a run that is killed and resumed ends with the weights of an uninterrupted run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from ..training.settings import Settings
from ..training.train import train


class Kill(TrainerCallback):
    """Ends the process as ``kill -9`` does, during the step after ``step``."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(config: Path, step: int) -> None:
    """Train in a separate process that is killed after ``step`` steps.

    The process kills itself, so that it ends at exactly this step on a busy machine too. The operating system gives it
    no more time to clean up than a process that is killed from outside.

    Raises:
        RuntimeError: the process ended in another way.
    """
    code = "import sys; from mixlora_llava.example.resuming import Kill, Settings, train; "
    code += "train(Settings.read(sys.argv[1]), callbacks=[Kill(int(sys.argv[2]))])"
    paths = os.pathsep.join(path for path in sys.path if path)  # so that it imports the same packages
    log = config.with_suffix(".log")
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.run(
            [sys.executable, "-c", code, str(config.resolve()), str(step)],
            env=os.environ | {"PYTHONPATH": paths}, stdout=stream, stderr=stream,
        )  # fmt: skip
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the run ended with {process.returncode} instead of being killed: see {log}")


def kill_and_resume(whole: Settings, killed: Settings) -> dict:
    """Kill a run one step after its second checkpoint, resume it, and compare it with an uninterrupted run."""
    steps = whole.training["max_steps"]
    train(whole)
    file = Path(f"{killed.output}.yaml")
    file.write_text(yaml.safe_dump(vars(killed)), encoding="utf-8")
    train_until_killed(file, 2 * (steps // 4) + 1)
    reached = max(int(path.name.rpartition("-")[2]) for path in Path(killed.output).glob("checkpoint-*"))
    train(killed)
    one, other = (load_file(Path(run.output, "adapter_model.safetensors")) for run in (whole, killed))
    identical = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return {"killed_after": reached, "steps": steps, "tensors": len(one), "identical": identical}
