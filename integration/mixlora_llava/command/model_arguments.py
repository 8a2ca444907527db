"""Arguments that several subcommands take."""

import argparse

from ..data.conversation import TEMPLATES


def add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """``--model`` and ``--template``."""
    parser.add_argument(
        "--model", required=required, help="folder or hub name of a LLaVA, or its parts as JSON: "
        '{"language": ..., "vision": ..., "projector": ...}',
    )  # fmt: skip
    parser.add_argument("--template", choices=list(TEMPLATES), default="v1", help="of the conversation")
