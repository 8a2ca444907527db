"""Plot which factors are chosen for which inputs, as in Figures 5 and 6.

It writes the choices (selection.npz), how often each factor was chosen for each task (usage.json and a histogram), and
t-SNE maps with the Jaccard metric (tsne.json and a picture).
"""

import argparse
import json

from .model_arguments import add_model, add_routed_questions, chosen_template
from .values import place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_routed_questions(parser)
    parser.add_argument("--layers", type=int, nargs="+", help="for the maps")
    parser.add_argument("--output", type=place, required=True)


def run(options: argparse.Namespace) -> None:
    from ..analysis.selection import check_layers, record, write
    from ..model.load import load_adapter, load_llava, read_source
    from ..scoring.predict import read_tasks

    questions = read_tasks(options.questions, options.per_task)
    model, processor = load_llava(read_source(options.model))
    model, embeddings = load_adapter(model, options.adapter)
    check_layers(model, options.layers or [])
    selections = record(
        model, processor, questions, options.images, template=chosen_template(options), embeddings=embeddings
    )
    print(json.dumps(write(selections, options.output, options.layers), indent=1))
