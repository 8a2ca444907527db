"""Engines for the serving tests. Those that need vLLM run in an environment of their own (environment.sh)."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTED = " ".join((ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split())
needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None,
    reason="vLLM is not installed; tests/serving/environment.sh FOLDER makes an environment with it, and "
    "FOLDER/bin/python -m pytest tests/serving runs these tests there",
)


def engine_environment(**more: str) -> dict[str, str]:
    """The environment of a process that runs vLLM."""
    from .engine import ENVIRONMENT

    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, **ENVIRONMENT, **more}


@pytest.fixture(scope="session")
def run_jobs(tmp_path_factory):
    """Run jobs of ``engine`` in a process of its own: their results."""

    def run(jobs: list[dict], processes: bool = False) -> list[dict]:
        folder = tmp_path_factory.mktemp("engine")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [
            sys.executable,
            "-m",
            "tests.serving.engine",
            str(folder / "jobs.json"),
            str(folder / "results.json"),
        ]
        environment = engine_environment(VLLM_ENABLE_V1_MULTIPROCESSING=str(int(processes)))
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
        return json.loads((folder / "results.json").read_text())

    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from .models import save_adapter, save_llama

    folder = tmp_path_factory.mktemp("saved")
    save_adapter(save_llama(folder / "model"), folder / "adapter")
    return folder
