"""Whether a command line that a page shows could be run: its program exists, and takes its options."""

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def check(line: str) -> None:
    """Check a command line.

    Raises:
        AssertionError: an unknown program, file, module, subcommand or option, a value of a wrong type, JSON that is
            none, or an extra that the package does not have.
    """
    program, *arguments = shlex.split(line)
    if Path(program).name in ("python", "python3"):
        check_python(arguments)
    elif program.startswith("benchmarks/") and program.endswith(".sh"):
        assert (ROOT / program).is_file(), f"{program} is not there"
    elif (known := PROGRAMS.get(Path(program).name)) is not None:
        known(arguments)
    else:
        raise AssertionError(f"nothing here knows how to check {program}: add it to {Path(__file__).name}")


def check_python(arguments: list[str]) -> None:
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), f"{arguments[0]} is not there"
        check_options((sys.executable, arguments[0]), arguments[1:])
    elif arguments[1] in PROGRAMS:
        PROGRAMS[arguments[1]](arguments[2:])
    else:
        check_options((sys.executable, "-m", arguments[1]), arguments[2:])


def check_options(program: tuple[str, ...], arguments: list[str]) -> None:
    """Ask a program for its help behind all other arguments: it reads these first, and fails at a value or choice that
    it does not take. It does not fail at an option that it does not know, so each option is looked up in the help."""
    asked = (*program, *arguments, *(() if "--help" in arguments else ("--help",)))
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
    check_known(options, ask_for_help(asked), " ".join(asked))


def check_known(options: list[str], text: str, asked: str) -> None:
    """Each option is in the help that a command line asks for."""
    unknown = [option for option in options if not re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text)]
    assert not unknown, f"{asked} shows no options {unknown}"


@cache
def ask_for_help(asked: tuple[str, ...]) -> str:
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(asked)} ends with {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


def check_mixlora(arguments: list[str]) -> None:
    check_options((sys.executable, "-m", "mixlora_llava", *arguments[:1]), arguments[1:])


def check_pip(arguments: list[str]) -> None:
    assert arguments.pop(0) == "install", "pip is only known to install"
    while arguments:
        argument = arguments.pop(0)
        if argument == "-c":
            assert (ROOT / arguments.pop(0)).is_file(), "pip's constraints are not there"
        elif argument == "-e" or argument == "--upgrade":
            continue
        elif argument.startswith("."):
            check_extras(Requirement(f"mixlora_kernels{argument[1:]}"))
        else:
            check_extras(Requirement(argument))


def check_extras(requirement: Requirement) -> None:
    if requirement.name.replace("-", "_") != "mixlora_kernels":
        return
    offered = set(metadata("mixlora_kernels").get_all("Provides-Extra", []))
    assert requirement.extras <= offered, f"the package has the extras {sorted(offered)}, got {requirement}"


def check_accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch", "accelerate is only known to launch"
    if not arguments[1:]:
        return  # a page names the command
    parsed = launch_command_parser().parse_args(arguments[1:])
    if parsed.module:
        check_python(["-m", parsed.training_script, *parsed.training_script_args])


def check_vllm(arguments: list[str]) -> None:
    """Its options as far as they are this package's; tests/serving asks vLLM for the rest, where it is installed."""
    assert arguments[0] == "serve", "vllm is only known to serve"
    extra = arguments[arguments.index("--model-loader-extra-config") + 1]
    assert set(json.loads(extra)) <= {"adapter", "load_format", "backend"}, f"not what the loader takes: {extra}"
    if "--scheduler-cls" in arguments:
        module, _, name = arguments[arguments.index("--scheduler-cls") + 1].rpartition(".")
        spec = find_spec(module)
        assert spec and re.search(rf"^class {name}\b", Path(spec.origin).read_text(encoding="utf-8"), re.MULTILINE)


def check_curl(arguments: list[str]) -> None:
    body = json.loads(arguments[arguments.index("-d") + 1])
    assert {"model", "prompt"} <= body.keys() or {"model", "messages"} <= body.keys(), f"no request: {body}"


def check_pytest(arguments: list[str]) -> None:
    check_options((sys.executable, "-m", "pytest"), arguments)


def check_venv(arguments: list[str]) -> None:
    check_options((sys.executable, "-m", "venv"), arguments)


PROGRAMS = {
    "accelerate": check_accelerate,
    "curl": check_curl,
    "mixlora": check_mixlora,
    "pip": check_pip,
    "pytest": check_pytest,
    "venv": check_venv,
    "vllm": check_vllm,
}
