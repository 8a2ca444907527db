"""The table of refusals on the page serving.md and ``refusals.py`` name the same messages. Needs no vLLM.

``test_refusals.py`` raises each message; this compares the two lists, so that a refusal without a row and a row without
a refusal fail.
"""

import ast
import re

import pytest

from .conftest import ROOT
from .loading import PAGE

SOURCE = ROOT / "mixlora_kernels" / "serving" / "refusals.py"


def pattern_of(node: ast.expr) -> str:
    """A regular expression of what an expression of a string can be: what is put in at run time is anything."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(pattern_of, node.values))
    return ".*"


def refusals() -> dict[int, str]:
    """By its line in the source, the regular expression of each refusal's message as ``refuse`` writes it."""
    calls = (node for node in ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return {
        call.lineno: r"\. ".join(map(pattern_of, call.args))
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "Refusal"
    }


def rows() -> list[str]:
    """The messages of the table of settings."""
    table = PAGE.read_text(encoding="utf-8").split("| setting | message |\n|---|---|\n")[1].split("\n\n")[0]
    return [line.split("|")[2].strip() for line in table.splitlines()]


@pytest.mark.parametrize("line", refusals())
def test_every_refusal_has_a_row(line):
    pattern = refusals()[line]
    assert any(re.fullmatch(pattern, row) for row in rows()), f"{SOURCE.name}:{line} has no row in {PAGE.name}"


@pytest.mark.parametrize("row", rows())
def test_every_row_is_a_refusal(row):
    assert any(re.fullmatch(pattern, row) for pattern in refusals().values()), f"nothing in {SOURCE.name} says: {row}"
