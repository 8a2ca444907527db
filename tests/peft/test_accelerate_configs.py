"""The ready configurations are read by Accelerate. What they configure is run in test_distributed."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parents[2] / "integration" / "mixlora_llava" / "accelerate"
KINDS = {"ddp": "MULTI_GPU", "fsdp1": "FSDP", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def test_there_is_a_test_for_each():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # raises at a key that it does not know
    assert config.distributed_type == KINDS[name]


def _plugin_keys(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["fsdp_config"]


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_the_launcher_knows_every_key(name):
    from accelerate.commands.launch import launch_command_parser

    known = set(vars(launch_command_parser().parse_args(["--cpu", "train.py"])))
    assert set(_plugin_keys(name)) <= known


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_the_launcher_knows_every_key_of_zero(name):
    from accelerate.commands.launch import launch_command_parser

    known = set(vars(launch_command_parser().parse_args(["--cpu", "train.py"])))
    assert set(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["deepspeed_config"]) <= known
