"""Use one thread, because small models gain nothing from a second."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread here and in child processes.

    Products of this size gain nothing from a second thread. If other programs use the cores, threads that wait for one
    another take twenty times as long. The run that is killed must add in the same order as the others, so it inherits
    the setting through the environment.
    """
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("OMP_NUM_THREADS")
        os.environ |= {} if variable is None else {"OMP_NUM_THREADS": variable}
