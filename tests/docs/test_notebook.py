"""The notebook runs, prints what is kept in it, and its adapter gives the answers that the tasks have."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "first_adapter.ipynb"

pytestmark = pytest.mark.slow


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each cell of code prints, warnings aside."""
    return [
        "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[list[str], list[str]]:
    """What is kept in the notebook, and what it prints when it is run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    kept = printed(notebook)
    resources = {"metadata": {"path": str(tmp_path_factory.mktemp("notebook"))}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        NotebookClient(notebook, kernel_name="python3", resources=resources, timeout=300).execute()
    return kept, printed(notebook)


def test_it_prints_what_is_kept_in_it(executed):
    kept, found = executed
    assert found == kept


def test_the_frozen_model_cannot_what_the_adapted_one_can(executed):
    text = "".join(executed[1])
    assert "repeat:           20 of 20 right\nnext and previous: 0 of 38 right\n" in text
    assert "next and previous: 38 of 38 right\nwithout the adapter, repeat: 20 of 20 right\n" in text
    assert "frozen weights that changed: 0 of 21\n" in text


def test_the_loaded_adapter_serves_the_right_answers(executed):
    text = "".join(executed[1])
    assert "the same answers: True\n" in text
    for request, answer in {"next 7": "8", "previous 7": "6", "previous 12": "11"}.items():
        assert f"{request} -> {answer}\n" in text
    assert "each alone gives the same: True\n" in text
