"""Show how a trained adapter routes questions: which factors it uses, and where routing collapsed.

For each layer and pool it prints: the part of all choices that fell on the r most used factors (1 if all questions
chose the same factors, r / E if all factors are used equally), the number of factors that were never chosen, the mean
entropy of the routers' probabilities, and the part of near-ties, which are choices so close that bfloat16 may change
them.
"""

import argparse
import json

from .model_arguments import add_model, add_routed_questions, chosen_template
from .values import count, device, place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_routed_questions(parser)
    parser.add_argument("--batch-size", type=count, default=8)
    parser.add_argument("--device", type=device, help="a torch device; the model stays where it loads by default")
    parser.add_argument("--output", type=place, help="also write routing.json and routing.png into this folder")


def run(options: argparse.Namespace) -> None:
    from ..analysis.routing import describe, measure, plot
    from ..model.load import load_adapter, load_llava, read_source
    from ..scoring.predict import read_tasks

    questions = read_tasks(options.questions, options.per_task)
    model, processor = load_llava(read_source(options.model))
    model, embeddings = load_adapter(model, options.adapter)
    model.to(options.device or model.device)
    found = measure(
        model, processor, questions, options.images, template=chosen_template(options), batch_size=options.batch_size,
        embeddings=embeddings,
    )  # fmt: skip
    print(describe(found))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "routing.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        plot(found, options.output / "routing.png")
