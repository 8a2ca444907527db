"""Engines for the serving tests. Those that need vLLM run in an environment of their own (environment.sh)."""

import multiprocessing
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        find_spec("vllm") is None,
        reason="vLLM is not installed; tests/serving/environment.sh FOLDER makes an environment with it, and "
        "FOLDER/bin/python -m pytest tests/serving -n 2 --dist loadfile runs these tests there, two files at a time",
    ),
]


def engine_environment(**more: str) -> dict[str, str]:
    """The environment of a process that runs vLLM."""
    from .engine import ENVIRONMENT

    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, **ENVIRONMENT, **more}


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Of torch in this process: threads that share products as small as the tests' cost many times what they save."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Engines:
    """A process that runs jobs of ``engine`` one after the other."""

    def __init__(self, **more: str):
        """Start it, with more in its environment."""
        from .engine import serve

        spawn = multiprocessing.get_context("spawn")
        self.jobs, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs,))
        with pytest.MonkeyPatch.context() as patch:
            for name in set(os.environ) - set(environment := engine_environment(**more)):
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            self.process.start()
        theirs.close()

    def run(self, jobs: dict[str, dict]) -> dict[str, dict]:
        """The results of jobs by their names."""
        results = {}
        for name, job in jobs.items():
            self.jobs.send(job)
            assert self.jobs.poll(timeout=900), f"the job {name!r} takes more than 15 minutes"
            results[name] = self.jobs.recv()
        return results

    def stop(self) -> None:
        self.jobs.send(None)
        self.process.join()


@pytest.fixture(scope="session")
def engines():
    running = Engines()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def interpreted_engines():
    """With Triton's interpreter."""
    running = Engines(TRITON_INTERPRET="1")
    yield running
    running.stop()


@pytest.fixture
def offline(monkeypatch):
    """The environment of a process that runs vLLM, for this one."""
    from .engine import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with a Llama, ``model``, and its adapter, ``adapter``."""
    from .models import save_adapter, save_llama

    folder = tmp_path_factory.mktemp("saved")
    save_adapter(save_llama(folder / "model"), folder / "adapter")
    return folder
