"""A sound adapter, which the tests spoil."""

import pytest

from ..models import adapt, build
from .adapters import BIN, CONFIG, SAFE, weights_of, write


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    adapt(build(), target_modules=["q_proj"]).save_pretrained(folder)
    return folder


@pytest.fixture(params=[SAFE, BIN])
def folder(good, tmp_path, request):
    """A sound adapter, its weights in one of the two formats."""
    (tmp_path / CONFIG).write_text((good / CONFIG).read_text())
    write(tmp_path / request.param, weights_of(good))
    return tmp_path
