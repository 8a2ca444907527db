"""Run the example: its steps in order, and checks of their results. ``report.md`` describes them."""

import json
import time
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file

from ..analysis import interference, selection
from ..data.dataset import Collator
from ..model.load import load_adapter, load_llava
from ..scoring import scores
from ..scoring.exact import exact
from ..scoring.predict import predict, read_questions
from ..training.prepare import read_data
from ..training.settings import Settings
from ..training.train import train
from . import digits
from .pretraining import pretrain
from .report import plot_losses, plot_samples, report
from .resuming import kill_and_resume

TEMPLATE = "bare"
MARGIN = 25.0  # points by which MixLoRA's accuracy must exceed that of the untuned model
# LoRA with the rank r of MixLoRA, and with the rank that has about as many parameters as MixLoRA with its routers.
# MixLoRA is the preset with tied pairs. The scalings are the paper's: alpha is 2 r, and 2 E for MixLoRA.
TUNED = {
    "lora_r4": {"method": "lora", "r": 4},
    "lora_r24": {"method": "lora", "r": 24},
    "mixlora": {"method": "mixlora_tied", "r": 4, "num_factors": 16},
}
RATES = {"lora": 2e-3, "mixlora_tied": 1e-3}


class Size(NamedTuple):
    """The size of the example."""

    pretraining: int  # steps
    tuning: int  # steps of tuning
    killed: int  # steps of the run that is killed half-way
    per_task: int
    held_out: int


SIZES = {False: Size(600, 300, 40, 600, 100), True: Size(350, 150, 12, 300, 40)}


def run(folder: Path, size: Size) -> dict:
    """Run the example in ``folder``, and return the report's figures.

    Raises:
        RuntimeError: the loss did not fall, the margin was not reached, or the resumed run has other weights.
    """
    start, computing = time.monotonic(), time.process_time()
    digits.write(folder / "data", per_task=size.per_task, held_out=size.held_out)
    pretrain(folder, size.pretraining, TEMPLATE)
    losses = {name: train(settings(folder, name, size.tuning, **method))["loss"] for name, method in TUNED.items()}
    results = {name: evaluate(folder, name) for name in ("untuned", *TUNED)}
    figures = {
        "tasks": {name: {t: row["accuracy"] for t, row in result["tasks"].items()} for name, result in results.items()},
        "accuracy": {name: seen(result) for name, result in results.items()},
        "error": {name: standard_error(result) for name, result in results.items()},
        "parameters": {name: adapter_parameters(folder / name) for name in TUNED},
        "loss": {name: ends(list(loss.values())) for name, loss in losses.items()},
        "questions": size.held_out,
        "resumed": kill_and_resume(
            *(settings(folder, name, size.killed, **TUNED["mixlora"]) for name in ("whole", "killed"))
        ),
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
    return figures


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
    """The predictions and scores of the untuned model, or of an adapter."""
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
    """The held-out questions of the six trained tasks."""
    return [folder / f"data/eval/{task}.jsonl" for task in digits.TASKS]


def seen(result: dict) -> float:
    """The accuracy over the six tasks, in percent."""
    return mean_of([result["tasks"][task]["accuracy"] for task in digits.TASKS])


def standard_error(result: dict) -> float:
    """The standard error of ``seen`` from the number of questions. The variation between training seeds is not in
    it."""
    rows = [result["tasks"][task] for task in digits.TASKS]
    return sum(row["accuracy"] * (100 - row["accuracy"]) / row["count"] for row in rows) ** 0.5 / len(rows)


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
    """Check the results. The report has been written before."""
    failed = []
    if any(last >= first / 2 for first, last in figures["loss"].values()):
        failed.append(f"a loss did not fall by half: {figures['loss']}")
    if figures["accuracy"]["mixlora"] < figures["accuracy"]["untuned"] + MARGIN:
        failed.append(f"MixLoRA is not {MARGIN} points above the untuned model: {figures['accuracy']}")
    if not figures["resumed"]["identical"]:
        failed.append("the run that was killed and resumed ended with other weights")
    if failed:
        raise RuntimeError("; ".join(failed))
