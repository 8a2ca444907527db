"""The command: what it lists and finds by name, that it answers fast, and that mistakes get one sentence."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mixlora_kernels import __version__
from mixlora_llava import shipped
from mixlora_llava.command.main import COMMANDS, build_parser, main, subparsers

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "integration")))}


def called(*arguments, before="", **environment):
    """The command in a process of its own."""
    code = f"import sys; sys.argv[0] = 'mixlora'; {before}from mixlora_llava.command.main import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300)


def refused(capsys, *arguments):
    """What the command says of a mistake: one line, and the status of wrong arguments."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and "error: " in said.err
    return said.err


def test_help_lists_every_subcommand(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and all(re.search(rf"^    {name} +\w", said, re.MULTILINE) for name in COMMANDS)
    files = {file.stem for file in (ROOT / "integration/mixlora_llava/command").glob("*.py")}
    assert files == {*COMMANDS, "__init__", "main", "model_arguments", "values"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_subcommand_explains_each_argument(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    parser = subparsers(build_parser())[name]
    assert parser.description and parser.description.splitlines()[0] in said
    assert all(option in said for action in parser._actions for option in action.option_strings)
    for paragraph in parser.description.split("\n\n"):  # a line that is indented alone was broken by an editor
        indents = {len(line) - len(line.lstrip()) for line in paragraph.strip("\n").splitlines()}
        assert len(indents) == 1, paragraph


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["--print-completion", "bash"]])
def test_help_version_and_completion_import_neither_torch_nor_transformers(arguments):
    heavy = {"torch", "transformers", "peft", "numpy", "matplotlib", "PIL", "pydantic"}
    before = f"import atexit; atexit.register(lambda: print('LOADED', sorted({heavy} & set(sys.modules)))); "
    done = called(*arguments, before=before)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "LOADED []", done.stderr


def test_version_is_the_packages():
    assert called("--version").stdout == f"mixlora {__version__}\n"


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "mixlora_llava", "--version"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout == f"mixlora {__version__}\n"


def test_completion_knows_subcommands_and_their_options():
    script = called("--print-completion", "bash").stdout
    assert all(name in script for name in COMMANDS) and "--dry-run" in script and "--task-definitions" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_shipped_files_are_found_by_name(capsys):
    names = shipped.names()
    assert {"vision_flan_7b", "ddp", "fsdp1", "fsdp2", "zero2", "zero3", "lmms_tasks"} <= names.keys()
    for name, path in names.items():
        with pytest.raises(SystemExit):
            main(["--path", name])
        assert capsys.readouterr().out == f"{path}\n"
        if path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(path.read_text()), dict)
    assert (names["lmms_tasks"] / "mixlora_unseen.yaml").is_file() and names["ms_swift_plugin"].is_file()
    assert "'zero4' comes" in (said := refused(capsys, "--path", "zero4")) and "zero2, zero3" in said


def test_setup_ships_what_is_found_by_name():
    """By the patterns of package_data: an installed package has exactly the files that a clone has."""
    setup = (ROOT / "setup.py").read_text()
    patterns = json.loads(re.search(r'"mixlora_llava": (\[[^]]*\.yaml[^]]*\])', setup)[1])
    home = ROOT / "integration/mixlora_llava"
    found = {path for pattern in patterns for path in home.glob(pattern) if path.is_file()}
    wanted = [path if path.is_file() else [*path.iterdir()] for path in shipped.names().values()]
    files = {file for one in wanted for file in (one if isinstance(one, list) else [one]) if file.is_file()}
    assert {file for file in files if file.suffix != ".py"} <= found  # find_packages finds modules


def test_a_configuration_by_name_or_by_path(tmp_path, monkeypatch, capsys):
    assert shipped.configuration("vision_flan_7b") == shipped.names()["vision_flan_7b"]
    (tmp_path / "mine.yaml").write_text("r: 4")
    assert shipped.configuration(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"
    monkeypatch.chdir(tmp_path)
    assert shipped.configuration("mine.yaml") == Path("mine.yaml")
    for name in ("vision_flan_8b", "zero3", str(tmp_path)):
        assert "one of the names vision_flan_7b" in refused(capsys, "train", "--config", name)


def settings(folder, **changes):
    given = {"model": "nobody/no-model", "data": "d.json", "images": "i", "output": str(folder / "out")}
    (folder / "s.yaml").write_text(yaml.safe_dump(given | changes))
    return folder / "s.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nobody/no-model", {"language": "nobody/no-model", "vision": "nobody/no-tower"}])
def test_a_dry_run_without_a_connection_names_the_model_that_is_missing(tmp_path, model):
    done = called("train", "--config", settings(tmp_path, model=model), "--dry-run", HF_HUB_OFFLINE="1")
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert said.startswith("mixlora train: error: missing: the ") and "nobody/no-model" in said
    assert "hf download nobody/no-model" in said


@pytest.mark.slow
def test_a_dry_run_without_data_plans_and_names_what_is_missing(tmp_path, capsys, monkeypatch):
    from mixlora_llava.model import small

    small.save(*small.small_llava(["a b"], width=24, layers=1), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    file = settings(tmp_path, model="base", max_length=12)
    main(["train", "--config", str(file), "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert "one of 15 tokens is assumed" in "\n".join(lines)  # 11 of text, 4 of the image
    assert lines[-1].startswith("missing: d.json (data), i (images); get them") and str(tmp_path) in lines[-1]
    assert "d.json (data), i (images)" in refused(capsys, "train", "--config", file)  # a real run stops before it loads
    (tmp_path / "i").mkdir()
    assert "d.json (data); get" in refused(capsys, "train", "--config", file)


@pytest.mark.slow
def test_a_package_that_is_missing_is_named(tmp_path):
    done = called("train", "--config", settings(tmp_path), before="sys.modules['pydantic'] = None; ")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        'mixlora train: error: pydantic is not installed: pip install "mixlora_kernels[llava]"'
    )


def test_evaluate_says_what_it_needs(tmp_path, capsys):
    assert "--questions, --images, --output must be given" in refused(capsys, "evaluate", "--model", "m")
    (tmp_path / "a.jsonl").write_text('{"answer": "yes"}\n')
    assert "no JSON object with 'label'" in refused(
        capsys, "evaluate", "--pope", tmp_path / "a.jsonl", tmp_path / "a.jsonl"
    )
    assert "lacks existence.txt" in refused(capsys, "evaluate", "--mme", tmp_path)
