"""What the documentation names exists."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "method.md"
ROWS = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ") and "`" in line]
NAMES = sorted(set(re.findall(r"`((?:reference|eager|kernels|node)\.[\w.]+)`", "\n".join(ROWS))))


def test_the_table_has_every_equation_and_every_backend():
    numbers = ", ".join(row.split("|")[1].strip() for row in ROWS)
    assert set(range(5, 10)) <= set(map(int, re.findall(r"\d+", numbers)))
    for row in ROWS:
        cells = row.split("|")[3:-1]
        assert len(cells) == 5 and all("`" in cell for cell in cells), row


@pytest.mark.parametrize("name", NAMES)
def test_a_named_function_exists(name):
    if name.startswith("kernels."):
        pytest.importorskip("triton")  # which has no package for some platforms
    module, _, attribute = name.partition(".") if name.startswith("reference.") else name.rpartition(".")
    if name.startswith("node."):
        module, attribute = "node", name.partition(".")[2]
    package = "mixlora_kernels" if module == "reference" else "mixlora_kernels.backends"
    found = importlib.import_module(f"{package}.{module}")
    for part in attribute.split("."):
        assert hasattr(found, part), f"{name} is not there: mend docs/method.md"
        found = getattr(found, part)
