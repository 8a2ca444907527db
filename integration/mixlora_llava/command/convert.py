"""Convert released MixLoRA checkpoints to adapters, and back.

mixlora convert CHECKPOINT ADAPTER                        # released files to an adapter
mixlora convert ADAPTER CHECKPOINT --back --base RELEASED
"""

import argparse
import json
from pathlib import Path

from ..checkpoints.layouts import LAYOUTS
from .values import folder, place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=folder)
    parser.add_argument("target", type=place)
    parser.add_argument("--layout", choices=list(LAYOUTS), default="transformers", help="of the model to be adapted")
    parser.add_argument("--back", action="store_true", help="from an adapter to the released layout")
    parser.add_argument("--base", type=Path, help="with --back: a released checkpoint to take the frozen model from")


def run(options: argparse.Namespace) -> None:
    from ..checkpoints.convert import to_adapter, to_released

    if options.back:
        report = to_released(options.source, options.target, options.base)
    else:
        report = to_adapter(options.source, options.target, options.layout)
    print(json.dumps(report, indent=2))
