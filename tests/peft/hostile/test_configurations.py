"""Configurations with wrong values, of newer versions, and of sizes that nobody has."""

import subprocess
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

from mixlora_kernels import __version__
from mixlora_kernels.peft import ConditionalMixLoRAConfig, MixLoRALayer

from ..models import build
from .adapters import CONFIG, WAYS, check_refused, configure, load_by

CONFIGURATIONS = {
    "alpha NaN": ({"alpha": float("nan")}, "alpha must be a finite number or None, got nan"),
    "alpha infinite": ({"alpha": float("inf")}, "alpha must be a finite number or None, got inf"),
    "alpha a string": ({"alpha": "32"}, "alpha must be a finite number or None, got '32'"),
    "alpha a bool": ({"alpha": True}, "alpha must be a finite number or None, got True"),
    "alpha an integer beyond all floats": ({"alpha": 10**400}, "alpha must be a finite number or None, got 1000"),
    "dropout a string": ({"dropout": "0.1"}, "dropout must be a finite number, got '0.1'"),
    "dropout NaN": ({"dropout": float("nan")}, "dropout must be a finite number, got nan"),
    "dropout 1": ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    "r negative": ({"r": -1}, "r must be an integer of at least 1, got -1"),
    "r beyond the pool": ({"r": 10**30}, "r must not exceed num_factors"),
    "r a float": ({"r": 2.0}, "r must be an integer, got 2.0"),
    "num_factors a list": ({"num_factors": [6]}, r"num_factors must be an integer, got \[6\]"),
    "num_factors a bool": ({"num_factors": True}, "num_factors must be an integer, got True"),
    "routing unknown": ({"routing": "exec"}, "routing must be one of"),
    "gate a list": ({"gate": ["binary"]}, "gate must be one of"),
    "task_dim a bool": ({"routing": "task", "task_dim": True}, "task_dim must be an integer or None, got True"),
    "target_modules nested": ({"target_modules": [["q_proj"]]}, "target_modules must be a list of strings"),
    "target_modules of an empty name": ({"target_modules": ["q_proj", ""]}, "target_modules must be a list of strings"),
    "target_modules no expression": ({"target_modules": "(q_proj"}, "target_modules is not a valid regular expression"),
    "target_modules that match no layer": ({"target_modules": ["z_proj"]}, "z_proj.*not found"),
    "target_modules no linear layer": ({"target_modules": ["embed_tokens"]}, "embed_tokens is not supported"),
    "modules_to_save of all": ({"modules_to_save": [""]}, "modules_to_save must be a list of strings"),
    "layers_to_transform of strings": (
        {"layers_to_transform": ["0"]},
        "layers_to_transform must be a list of integers",
    ),
    "inference_mode a string": ({"inference_mode": "no"}, "inference_mode must be True or False"),
    "base model a number": ({"base_model_name_or_path": 5}, "base_model_name_or_path must be a string or None"),
    "version no version": ({"mixlora_kernels_version": "latest"}, "mixlora_kernels_version must be a version such as"),
    "version a number": ({"mixlora_kernels_version": 2}, "mixlora_kernels_version must be a string or None"),
    "a million factors": ({"num_factors": 1_000_000}, r"other shapes: .*\(6, 32\) in the file, \(1000000, 32\)"),
    "r of a million": ({"num_factors": 1_000_000, "r": 1_000_000}, "other shapes: .*1000000, 1000000, 32"),
    "other routing": ({"routing": "random"}, "unknown keys: .*router_A"),
    "fewer layers": ({"layers_to_transform": [0]}, r"unknown keys: .*layers\.1\."),
    "more layers": ({"target_modules": ["q_proj", "k_proj"]}, "missing keys: .*k_proj"),
    "modules_to_save that the file lacks": ({"modules_to_save": ["lm_head"]}, r"missing keys: .*lm_head\.weight"),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations(folder, case):
    settings, message = CONFIGURATIONS[case]
    configure(folder, **settings)
    check_refused(folder, ValueError, message)


@pytest.mark.parametrize(
    "text, error",
    [("[1, 2]", TypeError), ("{", ValueError), ("", ValueError), ("{}", Exception), ("[" * 9**5, Exception)],
)
def test_what_is_no_configuration(folder, text, error):
    """peft and transformers cannot tell whose it is; the error is theirs, and the model is as it was."""
    (folder / CONFIG).write_text(text)
    check_refused(folder, error, "")


def test_settings_of_a_saved_adapter_for_a_new_one(good):
    """A configuration that was read from a folder is no loading: another model gets an adapter of its own."""
    config = ConditionalMixLoRAConfig.from_pretrained(good)
    config.num_factors, config.inference_mode = 9, False
    model = get_peft_model(build(), config)
    layer = next(module for module in model.modules() if isinstance(module, MixLoRALayer))
    assert layer.mixlora_adapter["default"].lora_A.shape == (9, 32)


def test_a_newer_version(folder):
    configure(folder, mixlora_kernels_version="99.1")
    for way in WAYS:
        with pytest.warns(UserWarning, match=f"made by mixlora_kernels 99.1, and {__version__} is installed"):
            load_by(way, folder)[1]()


def test_settings_of_a_newer_version(folder):
    configure(folder, mixlora_kernels_version="99.1", shared_pools=True)
    for way in WAYS:
        with pytest.warns(UserWarning, match="made by mixlora_kernels 99.1"), pytest.warns(match="shared_pools"):
            load_by(way, folder)[1]()


EXPRESSION = """
import sys, time, torch, resource
from pathlib import Path
from tests.peft.hostile.adapters import load_by
way, folder = sys.argv[1:]
model, attempt = load_by(way, Path(folder))
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
try:
    attempt()
except ValueError as error:
    took = time.perf_counter() - start
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print("refused", took, more, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_million_factors_cost_nothing(folder, way):
    """The promise is 5 s and 500 MB; a process of its own, so that the peak of its memory is the refusal's."""
    configure(folder, num_factors=1_000_000, r=1_000)
    command = [sys.executable, "-c", EXPRESSION, way, str(folder)]
    root = Path(__file__).parents[3]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    word, seconds, megabytes, *message = output.splitlines()[-1].split()
    assert word == "refused" and "(1000000," in " ".join(message)
    assert float(seconds) < 5 and float(megabytes) < 500
