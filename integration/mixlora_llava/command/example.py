"""Run the whole system on real handwritten digits, in minutes on two cores and without a download.

A small LLaVA learns to caption images of digits, and to answer questions about captions. It takes the role of the
pretrained model. It is then tuned on six tasks of visual instructions, with MixLoRA (tied pairs) and with LoRA. The
models are evaluated and analysed, and a training is killed and resumed. report.md in the output folder has the results.
"""

import argparse
from pathlib import Path

from ..refusal import Refusal
from .values import place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=place, default=Path("llava_example"))
    parser.add_argument("--quick", action="store_true", help="fewer steps and questions")


def run(options: argparse.Namespace) -> None:
    if options.output.exists() and any(options.output.iterdir()):
        raise Refusal(
            f"{options.output} is not empty, and the example would resume what is there: give another --output"
        )

    from ..example.run import SIZES, run
    from ..example.threads import one_thread

    with one_thread():
        figures = run(options.output, SIZES[options.quick])
    print(f"{options.output / 'report.md'} after {figures['minutes']:.1f} minutes")
