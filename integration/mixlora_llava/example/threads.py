"""One thread, for models that gain nothing from a second."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Products as small as these gain nothing from a second thread; where other programs use the cores, threads that
    wait for one another take twenty times as long. The run that is killed must add in the same order as the others, and
    inherits this by its environment."""
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("OMP_NUM_THREADS")
        os.environ |= {} if variable is None else {"OMP_NUM_THREADS": variable}
