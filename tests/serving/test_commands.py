"""vLLM's own parser takes the options of the commands that the pages show."""

import pytest

from tests.docs.commands import check
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


@pytest.mark.parametrize("line", LINES)
def test_vllm_takes_the_options(line):
    check(line)
