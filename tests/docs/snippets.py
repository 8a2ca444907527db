"""The commands and snippets of README and docs: found, run, or, where a page says why they cannot be run here, checked.

A page is run from top to bottom in a folder of its own: its Python blocks are one program, its shell blocks run between
them, and a text block that follows one is what it prints. HTML comments, which readers do not see, tell what else there
is to know; each stands before the block it is about:

    <!-- given: CODE -->        Python that runs before the block, for what a page takes as given
    <!-- file: NAME -->         the block is written to this file
    <!-- not run: REASON -->    the block is not run; its commands' options and its imports are checked instead

    python tests/docs/snippets.py PAGE...    runs pages by hand, in the environment of this Python
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHOWN = ("json", "yaml", "text", "bibtex")  # languages that nothing runs
COMMENT = re.compile(r"<!--\s*(given|file|not run):\s*(.*?)\s*-->", re.DOTALL)
FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>.*)\n(?P<text>(?:.*\n)*?)(?P=fence)[ \t]*$", re.MULTILINE)
PROGRAMS = r"(?:accelerate|benchmarks/\S+|curl|mixlora|pip|pytest|python3?|vllm) "
INLINE = re.compile(rf"`((?:{PROGRAMS})[^`\n]*)`")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        language: what stands behind the fence.
        line: where it begins.
        given: Python to run before it.
        file: where to write it.
        reason: why it is not run; None where it is.
        output: what it prints, where the page says so.
    """

    language: str
    text: str
    line: int
    given: str | None = None
    file: str | None = None
    reason: str | None = None
    output: str | None = None

    @property
    def runs(self) -> bool:
        return self.reason is None and self.language in ("python", "bash")


def blocks(page: str) -> list[Block]:
    """The blocks of a page's text, MyST's directives left out.

    Raises:
        ValueError: a block without a language or with an unknown one, or a comment without a block.
    """
    found: list[Block] = []
    position = 0
    for match in FENCE.finditer(page):
        between, position = page[position : match.start()], match.end()
        line, language = page.count("\n", 0, match.start()) + 1, match["language"].strip()
        marks, first = dict(COMMENT.findall(between)), COMMENT.search(between)
        if first and COMMENT.sub("", between[first.start() :]).strip():
            raise ValueError(f"line {line}: a comment is for the block right behind it, got text between the two")
        if language == "text" and found and not between.strip():
            found[-1] = found[-1]._replace(output=match["text"])
        elif language in ("python", "bash", *SHOWN):
            found.append(
                Block(language, match["text"], line, marks.get("given"), marks.get("file"), marks.get("not run"))
            )
        elif not language.startswith("{"):
            raise ValueError(f"line {line}: a block needs a language, python, bash or {SHOWN}, got {language!r}")
    if rest := COMMENT.search(page[position:]):
        raise ValueError(f"no block follows the comment {rest.group()!r}")
    return found


def commands(block: Block) -> list[str]:
    """A shell block's command lines, without comments, continued lines joined."""
    joined = block.text.replace("\\\n", " ")
    lines = [re.sub(r"\s+# .*$", "", line) for line in joined.splitlines()]
    return [part.strip() for line in lines if line and not line.startswith("#") for part in line.split(" && ")]


def inline_commands(page: str) -> list[str]:
    """Commands that stand in a page's sentences and tables."""
    return INLINE.findall(FENCE.sub("", page))


def run(page: Path) -> list[int]:
    """Run a page in the current folder; returns the lines of the blocks that ran.

    Raises:
        AssertionError: a block printed something else than the page says, or a command failed.
    """
    names: dict = {"__name__": "__main__"}
    ran = []
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.given:
            exec(compile(block.given, f"{page.name}:{block.line} (given)", "exec"), names)
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        if not block.runs:
            continue
        printed = _run_python(page, block, names) if block.language == "python" else _run_shell(page, block)
        lines = iter(printed.splitlines())
        for line in (block.output or "").splitlines():
            assert line in lines, (  # this moves the iterator on, so that the order counts
                f"{page.name}, line {block.line}: prints\n{printed}\nand the page says\n{block.output}"
            )
        ran.append(block.line)
    return ran


def _run_python(page: Path, block: Block, names: dict) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)  # so that a traceback has its line
    return out.getvalue()


def _run_shell(page: Path, block: Block) -> str:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], capture_output=True, text=True)
    assert done.returncode == 0, f"{page.name}, line {block.line}: {block.text}{done.stdout}{done.stderr}"
    return done.stdout


def main(pages: list[str]) -> None:
    sys.path.pop(0)  # pages see what is installed, not what lies here
    # The commands of this Python's environment come first, whether or not it is activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for page in [Path(name).resolve() for name in pages]:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            print(f"{page.name}: blocks at lines {run(page)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
