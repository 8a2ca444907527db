"""Arguments that several subcommands take."""

import argparse
import logging
from pathlib import Path

from ..data.conversation import TEMPLATES
from ..training.remembered import trained_template
from .values import count, folder

DEFAULT = "v1"  # of the released models


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add ``--model`` and ``--template``."""
    parser.add_argument(
        "--model", required=required, help="folder or hub name of a LLaVA, or its parts as JSON: "
        '{"language": ..., "vision": ..., "projector": ...}',
    )  # fmt: skip
    parser.add_argument(
        "--template", choices=list(TEMPLATES),
        help=f"of the conversation; by default that of the adapter's training, or {DEFAULT} where none is recorded",
    )  # fmt: skip


def chosen_template(options: argparse.Namespace) -> str:
    """The given template, or the one that the adapter was trained with. It warns if the two differ."""
    trained = trained_template(options.adapter) if options.adapter else None
    if trained and options.template not in (None, trained):
        logging.getLogger(__name__).warning(
            "%s was trained with the template %s, and is asked with %s", options.adapter, trained, options.template
        )
    return options.template or trained or DEFAULT


def add_routed_questions(parser: argparse.ArgumentParser) -> None:
    """Add ``--adapter``, and the arguments for the questions to route: ``--questions``, ``--images``,
    ``--per-task``."""
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True, help="folder of JSONL files, one per task, or one")
    parser.add_argument("--images", type=folder, required=True)
    parser.add_argument("--per-task", type=count, default=300, help="questions of each task at most")
