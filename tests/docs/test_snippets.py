"""README and docs say what works: every snippet runs, or a page says why it does not, and then its options exist."""

import ast
import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .commands import check
from .snippets import PAGES, Block, blocks, commands, inline_commands

TEXTS = {str(page.relative_to(Path(__file__).parents[2])): page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = {name: blocks(text) for name, text in TEXTS.items()}
RUN = [name for name, found in BLOCKS.items() if any(block.runs for block in found)]
NOT_RUN = [
    pytest.param(block, id=f"{name}:{block.line}")
    for name, found in BLOCKS.items()
    for block in found
    if block.reason is not None
]
INLINE = sorted({line for text in TEXTS.values() for line in inline_commands(text)})


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_a_page_runs_from_top_to_bottom(name, tmp_path):
    """In a process and a folder of its own, as a reader would."""
    script, page = Path(__file__).with_name("snippets.py"), Path(__file__).parents[2] / name
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, script, page], cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str([block.line for block in BLOCKS[name] if block.runs]) in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("block", NOT_RUN)
def test_what_is_not_run_says_why_and_could_be(block: Block):
    assert len(block.reason.split()) > 2, f"line {block.line}: a reason is a sentence, got {block.reason!r}"
    if block.language == "bash":
        for line in commands(block):
            check(line)
    else:
        assert block.language == "python"
        check_imports(ast.parse(block.text))


@pytest.mark.slow
@pytest.mark.parametrize("line", INLINE)
def test_a_command_in_a_sentence_exists(line):
    check(line)


def check_imports(tree: ast.Module) -> None:
    """Whatever is imported exists, where its package is installed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and find_spec(node.module.partition(".")[0]):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert find_spec(alias.name.partition(".")[0]), f"{alias.name} is not installed"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mixlora train --config x --no-such-option", "shows no options"),
        ("mixlora evaluate --batch-size many", "ends with 2"),
        ("mixlora no-such-command", "ends with 2"),
        ('pip install ".[no-such-extra]"', "extras"),
        ("python benchmarks/no_such_file.py", "not there"),
        ("no-such-program --help", "nothing here knows"),
    ],
)
def test_a_command_that_does_not_exist_is_found(line, message):
    with pytest.raises(AssertionError, match=message):
        check(line)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```\nx = 1\n```\n", "needs a language"),
        ("<!-- not run: it takes hours -->\n\ntext\n\n```bash\nls\n```\n", "right behind it"),
        ("text\n<!-- given: x = 1 -->\n", "no block follows"),
    ],
)
def test_a_page_that_is_marked_wrongly_is_found(page, message):
    with pytest.raises(ValueError, match=message):
        blocks(page)


def test_a_page_that_says_another_output_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\nprint(2)\n```\n\n```text\n2\n1\n```\n", encoding="utf-8")
    script = Path(__file__).with_name("snippets.py")
    done = subprocess.run([sys.executable, script, page], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "and the page says" in done.stderr
