"""The command ``mixlora``.

Each subcommand is the module of its name in this folder: ``add_arguments`` adds its arguments, and ``run`` executes it.
The modules import torch and transformers only in ``run``, so that help and completion do not need them.
"""

import argparse
import runpy
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from .. import shipped
from ..refusal import Refusal
from .values import check, takes_path

# The subcommands in the order of the help, each with its description.
COMMANDS = {
    "train": "tune a LLaVA with MixLoRA or LoRA",
    "evaluate": "answer questions about images, and score the answers",
    "chat": "ask one question about one image",
    "report": "show how a trained adapter routes: which factors it uses, and where routing collapsed",
    "interference": "measure how much tasks interfere with one another (Figures 2 and 7)",
    "selection": "plot which factors are chosen for which inputs (Figures 5 and 6)",
    "convert": "convert released MixLoRA checkpoints to adapters, and back",
    "study": "repeat the study that compares MixLoRA with LoRA",
    "example": "run the whole system on handwritten digits, in minutes and without a download",
}
SHELLS = ("bash", "zsh", "tcsh")
OWN = ("mixlora_kernels", "mixlora_llava")


class Version(argparse.Action):
    """Prints the version. It reads the version without importing the package, which would import torch."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        spec = find_spec("mixlora_kernels")
        assert spec is not None and spec.origin is not None  # both packages come in one wheel
        versions = runpy.run_path(str(Path(spec.origin).with_name("versions.py")))
        print(f"mixlora {versions['__version__']}")
        parser.exit()


class ShippedPath(argparse.Action):
    """Prints the path of a shipped file."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            print(shipped.path(values))
        except Refusal as error:
            refuse(parser, error)
        parser.exit()


class Completion(argparse.Action):
    """Prints the script with which a shell completes the command."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            import shtab
        except ImportError:
            refuse(parser, "completion needs shtab: pip install shtab")
        for each in (parser, *subparsers(parser).values()):
            for action in each._actions:
                if takes_path(action):
                    action.complete = shtab.FILE
        print(shtab.complete(parser, shell=values))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command and its subcommands."""
    parser = argparse.ArgumentParser(
        prog="mixlora", description="Conditional Mixture-of-LoRA on LLaVA.", allow_abbrev=False
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version")
    parser.add_argument(
        "--path", action=ShippedPath, metavar="NAME",
        help=f"print where a file lies that comes with the package: {', '.join(shipped.names())}",
    )  # fmt: skip
    parser.add_argument(
        "--print-completion", action=Completion, choices=SHELLS, help="print a script that completes the command"
    )
    added = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, does in COMMANDS.items():
        module = import_module(f"{__package__}.{name}")
        one = added.add_parser(
            name, help=does, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )  # fmt: skip
        module.add_arguments(one)
        one.set_defaults(run=module.run)
    return parser


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The subcommands' parsers by name."""
    return next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def refuse(parser: argparse.ArgumentParser, message: object) -> None:
    """Print the error in one line, and exit with the status of wrong arguments."""
    parser.exit(2, f"{parser.prog}: error: {' '.join(str(message).splitlines())}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line; see ``mixlora --help``.

    Raises:
        SystemExit: with status 2, if an input cannot be used.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        check(subparsers(parser)[options.command], options)
        options.run(options)
    except Refusal as error:
        refuse(subparsers(parser)[options.command], error)
    except ModuleNotFoundError as error:
        if (library := (error.name or "").partition(".")[0]) in OWN:
            raise
        extra = "study" if options.command == "study" else "llava"
        needs = f'{library} is not installed: pip install "mixlora_kernels[{extra}]"'
        refuse(subparsers(parser)[options.command], needs)
