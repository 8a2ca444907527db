"""Mistakes that the tests must notice, and the script that makes them one at a time (``python -m tests.mutations``)."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """One mistake: ``old`` stands once in ``file``, and with ``new`` in its place one of ``tests`` has to fail.

    Attributes:
        tests: a selection of pytest's, as short as it can be.
        sanitized: whether ttsem runs the kernels, and has to say what is wrong with their use of memory.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str
    sanitized: bool = False
