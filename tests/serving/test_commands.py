"""vLLM's own parser knows the options of the commands that the pages show."""

import shlex

import pytest

from tests.docs.commands import check, check_known
from tests.docs.snippets import PAGES, blocks, commands

from .conftest import needs_vllm

pytestmark = needs_vllm

LINES = sorted(
    {
        line
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.language == "bash"
        for line in commands(block)
        if line.startswith("vllm")
    }
)


ASKED = "vllm serve --help=all"


@pytest.fixture(scope="module")
def help_text(engines):
    result = engines.run({"help": {"serve": ASKED.split()[2:]}})["help"]
    assert not result["exit"], result["log"]
    return result["log"]


@pytest.mark.parametrize("line", LINES)
def test_vllm_takes_the_options(line, help_text):
    check(line)
    check_known([argument for argument in shlex.split(line) if argument.startswith("--")], help_text, ASKED)
