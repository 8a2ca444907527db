"""Measure how much tasks interfere with one another: Equations 2 and 3, Figures 2 and 7.

Each adapter is measured at its own weights, on batches of the configuration's data. Give --adapter twice to compare
LoRA with MixLoRA. The numbers are written to interference.json, and the heat maps to the same folder.
"""

import argparse
import json
from pathlib import Path

from .. import shipped
from .values import count, device, place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="NAME", help="of the training, for model and data")
    parser.add_argument("--adapter", type=Path, action="append", required=True)
    parser.add_argument("--tasks", nargs="+", help="by default, all of the data's")
    parser.add_argument("--batches", type=count, default=4, help="of each task")
    parser.add_argument("--batch-size", type=count, default=8)
    parser.add_argument("--device", type=device, help="a torch device; the model stays where it loads by default")
    parser.add_argument("--output", type=place, required=True)


def run(options: argparse.Namespace) -> None:
    file = shipped.configuration(options.config)

    import torch

    from ..analysis.interference import measure, plot, sample_batches
    from ..data.dataset import Collator
    from ..model.load import load_adapter, load_llava
    from ..training.files import check_files
    from ..training.prepare import read_data
    from ..training.settings import Settings

    settings, results = Settings.read(file), {}
    check_files(settings)
    for folder in options.adapter:
        model, processor = load_llava(settings.model, settings.dtype)
        model.to(options.device or model.device)
        data = read_data(settings, processor)
        adapted, embeddings = load_adapter(model, folder)
        table = None if embeddings is None else torch.stack([embeddings[task] for task in data.task_ids])
        collator = Collator(processor.tokenizer.pad_token_id, table)
        tasks = options.tasks or list(data.task_ids)
        names = [each.resolve().name for each in options.adapter]
        name = folder.resolve().name
        results[name if names.count(name) == 1 else str(folder)] = measure(
            adapted, sample_batches(data, collator, tasks, options.batches, options.batch_size)
        )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "interference.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    plot(results, options.output / "interference.png")
    layers = sorted({key.rpartition(".")[0] for key in next(iter(results.values()))["groups"]})
    for key in layers:
        plot(results, options.output / f"interference_{key}.png", key)
    print(f"numbers and {len(layers) + 1} heat maps in {options.output}")
