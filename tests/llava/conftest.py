"""The models of these tests are too small for two threads; see ``one_thread``."""

import pytest

from mixlora_llava.example.threads import one_thread


@pytest.fixture(scope="package", autouse=True)
def in_one_thread():
    with one_thread():
        yield
