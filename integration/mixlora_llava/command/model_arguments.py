"""Arguments that several subcommands take."""

import argparse
from pathlib import Path

from ..data.conversation import TEMPLATES


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add ``--model`` and ``--template``."""
    parser.add_argument(
        "--model", required=required, help="folder or hub name of a LLaVA, or its parts as JSON: "
        '{"language": ..., "vision": ..., "projector": ...}',
    )  # fmt: skip
    parser.add_argument("--template", choices=list(TEMPLATES), default="v1", help="of the conversation")


def add_routed_questions(parser: argparse.ArgumentParser) -> None:
    """Add ``--adapter``, and the arguments for the questions to route: ``--questions``, ``--images``,
    ``--per-task``."""
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--questions", type=Path, required=True, help="folder of JSONL files, one per task, or one")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--per-task", type=int, default=300, help="questions of each task at most")
