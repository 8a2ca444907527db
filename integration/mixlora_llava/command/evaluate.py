"""Answer questions about images, and score the answers.

    mixlora evaluate --model MODEL [--adapter DIR] --questions DIR --images DIR --output DIR
    mixlora evaluate --mme DIR                        # score a results folder of MME's official tool
    mixlora evaluate --pope ANSWERS.jsonl LABELS.jsonl     # score files of POPE's official script

Questions are JSONL files, one for each task, with the fields unique_id, image_path, prompt and target. A stopped run
resumes where it stopped, and questions whose images could not be used are asked again. Each answer records what it was
made with. A run does not resume with answers of another model or adapter, about other images, or of other options.
"""

import argparse
import json
from pathlib import Path

from ..refusal import Refusal
from ..scoring.exact import EXACT
from .model_arguments import add_model, chosen_template
from .values import count, device, file, folder, place

NEEDED = ("model", "questions", "images", "output")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, required=False)
    parser.add_argument("--adapter", type=Path, help="without it, the untuned model answers")
    parser.add_argument("--questions", type=Path, help="folder of JSONL files, or one file")
    parser.add_argument("--images", type=folder)
    parser.add_argument("--output", type=place)
    parser.add_argument("--batch-size", type=count, default=8)
    parser.add_argument("--max-new-tokens", type=count, default=64)
    parser.add_argument("--device", type=device, help="a torch device; the model stays where it loads by default")
    parser.add_argument("--judge", default=EXACT, help=f"{EXACT!r}, or the folder or hub name of a causal model")
    parser.add_argument("--task-definitions", type=file, help="for routing by task: a JSON file of a text per task")
    parser.add_argument("--mme", type=folder, metavar="DIR", help="score MME's .txt files, and nothing else")
    parser.add_argument(
        "--pope", type=file, nargs=2, metavar=("ANSWERS", "LABELS"), help="score POPE's files, and nothing else"
    )


def run(options: argparse.Namespace) -> None:
    if options.mme or options.pope:
        report = score_files(options)
    else:
        if missing := [f"--{name}" for name in NEEDED if getattr(options, name) is None]:
            raise Refusal(f"{', '.join(missing)} must be given")
        report = answer_and_score(options)
    print(json.dumps(report, indent=2))


def score_files(options: argparse.Namespace) -> dict:
    """Score answers that another program generated."""
    from ..scoring import mme, pope

    if options.mme:
        return mme.score_folder(options.mme)
    answers, labels = options.pope
    return pope.score(pope.read_field(answers, "answer"), pope.read_field(labels, "label"))


def answer_and_score(options: argparse.Namespace) -> dict:
    """Answer all files of questions, write the answers to ``--output``, and score them."""
    import logging

    from ..model.digest import model_digest
    from ..model.load import load_adapter, load_llava, read_source
    from ..model.task_embeddings import embed_tasks, of_tasks, read_definitions, routes_by_task
    from ..scoring.judge import check_judge, load_judge
    from ..scoring.predict import predict, question_files, read_questions
    from ..scoring.scores import score_folder

    logging.basicConfig(level=logging.INFO)
    files = question_files(options.questions)
    questions, tasks = [read_questions(each) for each in files], [each.stem for each in files]
    definitions = read_definitions(options.task_definitions, tasks) if options.task_definitions else None
    check_judge(options.judge)
    model, processor = load_llava(read_source(options.model))
    model.to(options.device or model.device)
    given = embed_tasks(model, processor.tokenizer, definitions) if definitions else None
    embeddings = None
    if options.adapter:
        model, embeddings = load_adapter(model, options.adapter)
    if given and not routes_by_task(model):
        raise Refusal("--task-definitions is for an adapter that routes by task: leave it out")
    embedding = of_tasks(model, given or embeddings, tasks, "give --task-definitions")
    digest, template = model_digest(model), chosen_template(options)
    for asked, name in zip(questions, tasks):
        predict(
            model, processor, asked, options.images, options.output / f"{name}.jsonl", batch_size=options.batch_size,
            template=template, max_new_tokens=options.max_new_tokens,
            model_id=str(options.adapter or options.model), embedding=embedding[name], digest=digest,
        )  # fmt: skip
    report = score_folder(options.output, load_judge(options.judge, options.device))
    (options.output / "scores.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    return report
