"""Tune a LLaVA with MixLoRA or LoRA.

If a run was stopped or killed, the same command resumes it from its last complete checkpoint, and it ends with the same
weights. If the run is finished, the command says so and trains no further. On several GPUs:

    accelerate launch --config_file "$(mixlora --path zero3)" -m mixlora_llava train --config vision_flan_7b
"""

import argparse

from .. import shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="a file of settings, or one that comes with the package"
    )
    parser.add_argument("--method", help="instead of the file's: lora, mixlora, or one of its variants")
    parser.add_argument("--output", help="instead of the file's")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop; needs no weights")
    parser.add_argument("--strict", action="store_true", default=None, help="stop at bad records")
    parser.add_argument("--fresh", action="store_true", help="refuse to go on with a run that is there")


def run(options: argparse.Namespace) -> None:
    import logging

    file = shipped.configuration(options.config)  # before torch and transformers, which take seconds to import

    from ..training.settings import Settings

    settings = Settings.read(file, method=options.method, output=options.output, strict=options.strict)

    from ..training.plan import dry_run
    from ..training.train import train

    logging.basicConfig(level=logging.INFO)
    if options.dry_run:
        print(dry_run(settings))
        return
    report = train(settings, options.fresh)
    print(f"{report['steps']} steps; adapter and settings in {settings.output}")
