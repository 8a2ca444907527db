"""The whole system on real handwritten digits, in minutes on two cores and without a download.

    python -m mixlora_llava.example.run [--output DIR] [--quick]

A small LLaVA learns to caption images of digits, and to answer questions about captions in words; that stands for the
pretrained model. MixLoRA, with tied pairs, and LoRA then tune it on six tasks of visual instructions.
Everything is evaluated, killed and resumed, and analysed, as ``report.md`` tells.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments, set_seed

from ..analysis import interference, selection
from ..data.dataset import IGNORED, Collator, Conversations, Encoder
from ..model import small
from ..model.load import load_adapter, load_llava
from ..scoring import scores
from ..scoring.judge import exact
from ..scoring.predict import predict, read_questions
from ..training.settings import Settings
from ..training.train import LlavaTrainer, read_data, train
from . import digits
from .report import plot_losses, plot_samples, report

TEMPLATE = "bare"
MARGIN = 25.0  # points of accuracy that MixLoRA has to be above the untuned model
# LoRA with as many factors at work as MixLoRA, and of the rank that has about as many parameters as MixLoRA with its
# routers. MixLoRA: tied pairs and a normalized gate. The scalings are the paper's: alpha is 2 r, and 2 E for MixLoRA.
TUNED = {
    "lora_r4": {"method": "lora", "r": 4},
    "lora_r24": {"method": "lora", "r": 24},
    "mixlora": {
        "method": "mixlora", "r": 4, "num_factors": 16,
        "mixlora": {"conditioning": "tied", "gate": "normalized", "pool": "prompt"},
    },
}  # fmt: skip
RATES = {"lora": 2e-3, "mixlora": 1e-3}


class Size(NamedTuple):
    """How much is done."""

    pretraining: int  # steps
    tuning: int  # steps of tuning
    killed: int  # steps of the run that is killed half-way
    per_task: int
    held_out: int


SIZES = {False: Size(700, 350, 40, 600, 100), True: Size(350, 150, 12, 300, 40)}


def main(arguments: list[str] | None = None) -> dict:
    """Run it; returns the report's figures.

    Raises:
        RuntimeError: the loss did not fall, the margin was not reached, or the resumed run ended elsewhere.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("llava_example"))
    parser.add_argument("--quick", action="store_true", help="fewer steps and questions")
    options = parser.parse_args(arguments)
    if options.output.exists() and any(options.output.iterdir()):
        parser.error(f"{options.output} is not empty: what lies there would be gone on with; give another --output")
    with one_thread():
        return run(options.output, SIZES[options.quick])


@contextmanager
def one_thread() -> Iterator[None]:
    """Products as small as these gain nothing from a second thread; where other programs use the cores, threads that
    wait for one another take twenty times as long. The run that is killed must add in the same order as the others, and
    inherits this by its environment."""
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("OMP_NUM_THREADS")
        os.environ |= {} if variable is None else {"OMP_NUM_THREADS": variable}


def run(folder: Path, size: Size) -> dict:
    """See ``main``."""
    start, computing = time.monotonic(), time.process_time()
    digits.write(folder / "data", per_task=size.per_task, held_out=size.held_out)
    pretrain(folder, size.pretraining)
    losses = {name: train(settings(folder, name, size.tuning, **method))["loss"] for name, method in TUNED.items()}
    results = {name: evaluate(folder, name) for name in ("untuned", *TUNED)}
    figures = {
        "tasks": {name: {t: row["accuracy"] for t, row in result["tasks"].items()} for name, result in results.items()},
        "accuracy": {name: seen(result) for name, result in results.items()},
        "error": {name: standard_error(result) for name, result in results.items()},
        "parameters": {name: adapter_parameters(folder / name) for name in TUNED},
        "loss": {name: ends(list(loss.values())) for name, loss in losses.items()},
        "questions": size.held_out,
        "resumed": kill_and_resume(folder, size.killed),
        "silhouettes": analyse_selection(folder),
        "interference": analyse_interference(folder),
    }
    plot_losses(losses, folder / "loss.png")
    plot_samples(folder, list(results), folder / "samples.png")
    figures["minutes"] = (time.monotonic() - start) / 60
    figures["cpu_minutes"] = (time.process_time() - computing) / 60
    (folder / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    (folder / "report.md").write_text(report(figures, MARGIN), encoding="utf-8")
    check(figures)
    print(f"{folder / 'report.md'} after {figures['minutes']:.1f} minutes")
    return figures


def pretrain(folder: Path, steps: int) -> None:
    """Make the model that is to be tuned: the tower first, then, frozen, with the rest on captions and on reading."""
    model, processor = small.small_llava(digits.texts())
    data = Conversations.read(folder / "data/pretraining.json", folder / "data/images", Encoder(processor, TEMPLATE))
    set_seed(0)
    pretrain_tower(model.model.vision_tower, data, steps)
    model.model.vision_tower.requires_grad_(False)
    arguments = TrainingArguments(
        output_dir=str(folder / "pretraining"), max_steps=steps, per_device_train_batch_size=32, learning_rate=2e-3,
        lr_scheduler_type="cosine", warmup_steps=20, weight_decay=0.05, logging_steps=50, save_strategy="no",
        report_to="none", remove_unused_columns=False, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    collator = Collator(processor.tokenizer.pad_token_id)
    LlavaTrainer(model=model, args=arguments, train_dataset=data, data_collator=collator).train()
    small.save(model.eval(), processor, folder / "base")


def pretrain_tower(tower: torch.nn.Module, data: Conversations, steps: int) -> None:
    """Teach the vision tower which words an image's caption has; it stands for CLIP's pretraining."""
    items = [data[index] for index, record in enumerate(data.records) if record.image is not None]
    pixels = torch.cat([item["pixel_values"] for item in items])  # [N, 3, 16, 16]
    words = torch.zeros(len(items), len(data.encoder.tokenizer))
    for row, item in zip(words, items):
        row[item["labels"][item["labels"] != IGNORED]] = 1
    head = torch.nn.Linear(tower.config.hidden_size, words.shape[1])
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.05)
    tower.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        rows = torch.randint(len(items), (64,))
        logits = head(tower(pixels[rows]).last_hidden_state[:, 1:].mean(1))
        target = words[rows] / words[rows].sum(1, keepdim=True)
        loss = torch.nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def settings(folder: Path, name: str, steps: int, **method) -> Settings:
    training = {
        "max_steps": steps, "per_device_train_batch_size": 32, "learning_rate": RATES[method["method"]],
        "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "logging_steps": 1, "save_steps": max(1, steps // 4),
        "save_total_limit": 2, "use_cpu": True, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    return Settings(
        model=str(folder / "base"), data=str(folder / "data/train.json"), images=str(folder / "data/images"),
        output=str(folder / name), template=TEMPLATE, training=training, **method,
    )  # fmt: skip


def evaluate(folder: Path, name: str) -> dict:
    """Predictions and scores of the untuned model, or of the adapter of that name."""
    model, processor = load_llava(folder / "base")
    if name != "untuned":
        model, _ = load_adapter(model, folder / name)
    output = folder / "predictions" / name
    for file in question_files(folder):
        predict(
            model, processor, read_questions(file), folder / "data/images", output / file.name, batch_size=50,
            template=TEMPLATE, model_id=name, max_new_tokens=8,
        )  # fmt: skip
    result = scores.score_folder(output, exact)
    (output / "scores.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def question_files(folder: Path) -> list[Path]:
    """The held-out questions of the tasks that were tuned on."""
    return [folder / f"data/eval/{task}.jsonl" for task in digits.TASKS]


def seen(result: dict) -> float:
    """Accuracy over the six tasks, in percent."""
    return mean_of([result["tasks"][task]["accuracy"] for task in digits.TASKS])


def standard_error(result: dict) -> float:
    """Of ``seen``, from the number of questions alone; another seed of the training would add to it."""
    rows = [result["tasks"][task] for task in digits.TASKS]
    return sum(row["accuracy"] * (100 - row["accuracy"]) / row["count"] for row in rows) ** 0.5 / len(rows)


class Kill(TrainerCallback):
    """Ends the process as ``kill -9`` does, within the step after ``step``."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(config: Path, step: int) -> None:
    """Train in a process of its own that is killed after ``step`` steps.

    A process that kills itself does so at that very step, however the machine is loaded; the system leaves it no more
    time to tidy up than it leaves one that is killed from outside.

    Raises:
        RuntimeError: it ended otherwise.
    """
    code = "import sys; from mixlora_llava.example.run import Kill, Settings, train; "
    code += "train(Settings.read(sys.argv[1]), callbacks=[Kill(int(sys.argv[2]))])"
    paths = os.pathsep.join(path for path in sys.path if path)  # it finds what this process found
    log = config.with_suffix(".log")
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.run(
            [sys.executable, "-c", code, str(config.resolve()), str(step)],
            env=os.environ | {"PYTHONPATH": paths}, stdout=stream, stderr=stream,
        )  # fmt: skip
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the run ended with {process.returncode} instead of being killed: see {log}")


def kill_and_resume(folder: Path, steps: int) -> dict:
    """Kill a run a step after its second checkpoint, let it go on, and compare it with one that was left alone."""
    whole, killed = (settings(folder, name, steps, **TUNED["mixlora"]) for name in ("whole", "killed"))
    train(whole)
    file = folder / "killed.yaml"
    file.write_text(yaml.safe_dump(vars(killed)), encoding="utf-8")
    train_until_killed(file, 2 * (steps // 4) + 1)
    reached = max(int(path.name.rpartition("-")[2]) for path in (folder / "killed").glob("checkpoint-*"))
    train(killed)
    one, other = (load_file(folder / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    identical = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return {"killed_after": reached, "steps": steps, "tensors": len(one), "identical": identical}


def analyse_selection(folder: Path) -> dict:
    model, processor = load_llava(folder / "base")
    model, _ = load_adapter(model, folder / "mixlora")
    questions = {file.stem: read_questions(file)[:60] for file in question_files(folder)}
    found = selection.record(model, processor, questions, folder / "data/images", template=TEMPLATE, batch_size=30)
    return selection.write(found, folder / "selection")


def analyse_interference(folder: Path) -> dict:
    results = {}
    for name in ("lora_r4", "mixlora"):
        model, processor = load_llava(folder / "base")
        data = read_data(settings(folder, name, 1, **TUNED[name]), processor)
        model, _ = load_adapter(model, folder / name)
        collator = Collator(processor.tokenizer.pad_token_id)
        results[name] = interference.measure(
            model, interference.sample_batches(data, collator, list(digits.TASKS), 4, 16)
        )
    (folder / "interference.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    interference.plot(results, folder / "interference.png")
    return {name: result["negative"] for name, result in results.items()}


def mean_of(values: list[float]) -> float:
    return sum(values) / len(values)


def ends(values: list[float], count: int = 10) -> list[float]:
    """The means of the first and of the last values."""
    return [mean_of(values[:count]), mean_of(values[-count:])]


def adapter_parameters(folder: Path) -> int:
    """The adapter's own parameters, without the projector's."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return sum(tensor.numel() for name, tensor in tensors.items() if ".layers." in name)


def check(figures: dict) -> None:
    """What has to hold; the report is written before."""
    failed = []
    if any(last >= first / 2 for first, last in figures["loss"].values()):
        failed.append(f"a loss did not fall by half: {figures['loss']}")
    if figures["accuracy"]["mixlora"] < figures["accuracy"]["untuned"] + MARGIN:
        failed.append(f"MixLoRA is not {MARGIN} points above the untuned model: {figures['accuracy']}")
    if not figures["resumed"]["identical"]:
        failed.append("the run that was killed and resumed ended with other weights")
    if failed:
        raise RuntimeError("; ".join(failed))


if __name__ == "__main__":
    main()
