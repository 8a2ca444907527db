"""The mutations fit the code, and the script tells a mistake that is noticed from one that is not."""

import re

import pytest

from . import mutations
from .mutations import __main__ as script


@pytest.mark.parametrize("mutation", script.MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_mutation_fits_the_code(mutation, tmp_path):
    """Its text stands once in its file, and its tests are there."""
    file = tmp_path / mutation.file
    file.parent.mkdir(parents=True)
    file.write_text((script.ROOT / mutation.file).read_text(encoding="utf-8"), encoding="utf-8")
    script.apply(mutation, tmp_path)
    path, _, test = mutation.tests.partition("::")
    assert (script.ROOT / path).exists()
    if test:
        source = (script.ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {test.partition('[')[0]}\(", source, re.MULTILINE)


def test_a_mutation_that_no_longer_fits_is_refused(tmp_path):
    mutation = mutations.Mutation("gone", "code.py", "old", "new", "tests")
    (tmp_path / "code.py").write_text("old, old")
    with pytest.raises(ValueError, match=r"gone: code\.py has 'old' 2 times"):
        script.apply(mutation, tmp_path)


@pytest.mark.slow
def test_what_survives_is_told_from_what_is_caught(monkeypatch, capsys):
    """A mistake, a change that is none, and one whose tests do not exist."""
    file, tests = "mixlora_kernels/reference.py", "tests/test_reference.py::test_masked_average"
    monkeypatch.setattr(script, "MUTATIONS", [
        mutations.Mutation("wrong", file, "h = h[mask.bool()]", "h = h", tests),
        mutations.Mutation("right", file, "h = h[mask.bool()]", "h = h[mask != 0]", tests),
        mutations.Mutation("unknown", file, "h = h[mask.bool()]", "h = h", "tests/test_reference.py::test_nothing"),
    ])  # fmt: skip
    monkeypatch.setattr("sys.argv", ["mutations"])
    assert script.main() == 1
    told = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["caught", "SURVIVED", "UNCLEAR", "1"]
