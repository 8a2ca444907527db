"""The tested range: where it stands, and what is said outside of it."""

import importlib.metadata
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import mixlora_kernels
from mixlora_kernels.versions import TESTED, UntestedVersionWarning, warn_of_untested

ROOT = Path(__file__).parents[1]


def pretend(monkeypatch, **installed):
    def version(name):
        if installed.get(name) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr("mixlora_kernels.versions.version", version)
    monkeypatch.setitem(TESTED, "torch", ("2.6", "2.13"))
    monkeypatch.setitem(TESTED, "peft", ("0.21.1", "0.21"))


@pytest.mark.parametrize(
    "installed",
    [{}, {"torch": "2.6"}, {"torch": "2.6.0"}, {"torch": "2.13.7+cpu", "peft": "0.21.1"}, {"torch": "2.10.0.dev1+x"}],
)
def test_nothing_is_said_inside_of_the_range(monkeypatch, installed):
    pretend(monkeypatch, **installed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untested("torch", "peft")


@pytest.mark.parametrize(
    ("installed", "told"),
    [
        ({"torch": "2.14.0"}, ["torch 2.14.0 (tested: 2.6 to 2.13)"]),
        ({"torch": "2.5.9", "peft": "0.21.2"}, ["torch 2.5.9 (tested: 2.6 to 2.13)"]),
        ({"torch": "3.0", "peft": "0.21.0"}, ["torch 3.0 (", "peft 0.21.0 (tested: 0.21.1 to 0.21)"]),
    ],
)
def test_one_warning_tells_all_that_is_outside(monkeypatch, installed, told):
    pretend(monkeypatch, **installed)
    with pytest.warns(UntestedVersionWarning) as caught:
        warn_of_untested("torch", "peft")
    assert len(caught) == 1 and all(text in str(caught[0].message) for text in told)
    assert ("peft" in str(caught[0].message)) == (len(told) == 2)


@pytest.mark.parametrize(
    ("module", "concerned"),
    [
        ("mixlora_kernels", {"torch", "triton"}),
        pytest.param("mixlora_kernels.peft", {*TESTED}, marks=pytest.mark.slow),
    ],
)
def test_an_import_warns_of_what_its_part_needs(module, concerned):
    """Each import in a process of its own, as if nothing that is installed had been tested."""
    code = "import runpy, sys, types, warnings\n"
    code += "found = runpy.run_path('mixlora_kernels/versions.py', run_name='mixlora_kernels.versions')\n"
    code += "found['TESTED'].update({name: ('0.0', '0.0') for name in found['TESTED']})\n"
    code += "module = types.ModuleType('mixlora_kernels.versions'); module.__dict__.update(found)\n"
    code += "sys.modules['mixlora_kernels.versions'] = module\n"
    code += "with warnings.catch_warnings(record=True) as caught:\n"
    code += f"    warnings.simplefilter('always')\n    import {module}\n"
    code += "print([str(w.message) for w in caught if w.category.__name__ == 'UntestedVersionWarning'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1]
    installed = {name for name in concerned if _installed(name)}
    assert {name for name in TESTED if re.search(rf"\b{name} \d[^(]*\(tested", said)} == installed
    assert said.count("mixlora_kernels 0.") == (1 if module == "mixlora_kernels" else 2)


def _installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_importing_the_layer_needs_torch_alone():
    code = "import sys, torch\nbefore = set(sys.modules)\nimport mixlora_kernels\n"
    code += "print({name.partition('.')[0] for name in set(sys.modules) - before}"
    code += " & {'transformers', 'peft', 'accelerate', 'trl', 'triton', 'packaging', 'pydantic'})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("files", [["constraints.txt", "constraints-newest.txt"], ["constraints-oldest.txt"]])
def test_what_ci_installs_is_the_range(files):
    """torch alone is neither the oldest nor the newest, because other builds than 2.13's are too large for CI."""
    pinned = {}
    for file in files:
        pinned |= dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / file).read_text(), re.MULTILINE))
    for name in ("transformers", "peft", "accelerate", "trl"):
        expected = TESTED[name][0 if files == ["constraints-oldest.txt"] else 1]
        assert (pinned[name] + ".").startswith(expected + "."), name


def test_setup_has_the_version_and_the_lower_bounds_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('setup.py must not import torch')")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)], cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "mixlora_kernels.egg-info/PKG-INFO").read_text()
    assert f"\nVersion: {mixlora_kernels.__version__}\n" in told
    for name, (oldest, _) in TESTED.items():
        assert re.search(rf"^Requires-Dist: {name}\b.*>={re.escape(oldest)}\b", told, re.MULTILINE), name
