"""What a file of settings may say, and what it is told otherwise."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_llava.command.main import main
from mixlora_llava.training.settings import METHODS, Settings

PAPER = Path(__file__).parents[2] / "integration/mixlora_llava/configs/vision_flan_7b.yaml"
LEAST = {"model": "m", "data": "d", "images": "i", "output": "o"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": "4"}, "r: Input should be a valid integer, got '4'"),
        ({"r": True}, "r: Input should be a valid integer, got True"),
        ({"r": 4.0}, "r: Input should be a valid integer, got 4.0"),
        ({"r": 0}, "r: Input should be greater than or equal to 1, got 0"),
        ({"r": 17}, "r must not exceed num_factors, got r=17 and num_factors=16"),
        ({"max_length": -1}, "max_length: Input should be greater than or equal to 1, got -1"),
        ({"limit": 0}, "limit: Input should be greater than or equal to 1, got 0"),
        ({"data": 5}, "data: Input should be a valid string, got 5"),
        ({"images": ""}, "images: String should have at least 1 character, got ''"),
        ({"output": None}, "output: Input should be a valid string, got None"),
        ({"alpha": float("nan")}, "alpha: Input should be a finite number, got nan"),
        ({"alpha": float("inf")}, "alpha: Input should be a finite number, got inf"),
        ({"alpha": "32"}, "alpha: Input should be a valid number, got '32'"),
        ({"dropout": 1}, "dropout: Input should be less than 1, got 1"),
        ({"strict": 1}, "strict: Input should be a valid boolean, got 1"),
        ({"strict": "no"}, "strict: Input should be a valid boolean, got 'no'"),
        ({"method": "mixlora_tasks"}, "method: Input should be 'lora', 'mixlora', .* got 'mixlora_tasks'"),
        ({"method": "mixlora_task"}, "task_definitions must be given"),
        ({"task_definitions": "t.json"}, "task_definitions must be given .* and only then"),
        ({"dtype": "bf16"}, "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16', got 'bf16'"),
        ({"template": "v2"}, "template: Input should be 'v1', 'llava_v1' or 'bare', got 'v2'"),
        ({"model": {"language": "l"}}, r"model\..*\.vision: Field required"),
        ({"model": {"language": "l", "vision": "v", "head": "h"}}, r"model\..*\.head: Extra inputs are not permitted"),
        ({"modle": "x"}, "modle: Extra inputs are not permitted, got 'x'. Known fields are model, data, images"),
        ({"mixlora": {"pools": "all"}}, "mixlora.pools: Extra inputs are not permitted"),
        ({"mixlora": {"pool": "most"}}, "mixlora.pool: Input should be 'sequence', .* got 'most'"),
        ({"mixlora": {"r": 8}}, "mixlora.r: Extra inputs are not permitted"),
        ({"mixlora": {"routing": "task"}}, "mixlora.routing: Extra inputs are not permitted"),
        ({"method": "mixlora_random", "mixlora": {"gate": "weighted"}}, "which routing='random' does not have"),
        ({"training": 5}, "training: Input should be a valid dictionary, got 5"),
        ({"training": {"warmup": 1}}, "training.warmup: Extra inputs are not permitted"),
        ({"training": {"output_dir": "x"}}, "training.output_dir: Extra inputs are not permitted"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate: Input should be a valid number, got 'fast'"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: Input should be a finite number"),
        ({"training": {"per_device_train_batch_size": "8"}}, "valid integer, got '8'"),
        ({"training": {"bf16": "true"}}, "training.bf16: Input should be a valid boolean, got 'true'"),
    ],
)
def test_settings_refused(tmp_path, change, message):
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(LEAST | change))
    with pytest.raises(ValueError, match=message) as error:
        Settings.read(file)
    assert str(file) in str(error.value) and "pydantic.dev" not in str(error.value)
    with pytest.raises(ValidationError):
        Settings(**(LEAST | change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "cannot be read as YAML"),
        ("model: " + "[" * 2_000, "cannot be read as YAML: maximum recursion depth"),
        ("- model", "must hold fields and values, got list"),
        ("", "must hold fields and values, got NoneType"),
        ("model: x", "data: Field required; images: Field required; output: Field required$"),
        ("model: x\nr: 4\ntraining: {}\nr: 8", "found r more than once"),
        ("model: x\ntraining:\n  seed: 1\n  seed: 2", "found seed more than once"),
    ],
)
def test_settings_files_refused(tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Settings.read(tmp_path / "wrong.yaml")
    assert "wrong.yaml" in str(error.value)


def test_every_wrong_field_is_told_at_once(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(LEAST | {"r": "4", "max_length": -1, "data": 5}))
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", str(tmp_path / "s.yaml"), "--dry-run"])
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert all(name in told for name in ("data: Input", "r: Input", "max_length: Input"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("4e-5", 4e-5), ("4.0e-5", 4e-5), ("1E3", 1000.0), ("2.e2", 200.0), (".5e1", 5.0), ("1", 1.0), ("0.5", 0.5)],
)
def test_rates_are_numbers_with_and_without_a_dot(tmp_path, text, value):
    """YAML 1.1 takes 4e-5 for a text."""
    (tmp_path / "s.yaml").write_text(
        f"{{model: x, data: x, images: x, output: x, alpha: {text}, training: {{learning_rate: {text}}}}}"
    )
    given = Settings.read(tmp_path / "s.yaml")
    assert given.alpha == value and given.training == {"learning_rate": value}


@pytest.mark.parametrize("method", METHODS)
def test_what_was_read_is_what_was_written(tmp_path, method):
    """And what was checked stays as it was checked."""
    task = {"task_definitions": "t.json"} if "task" in method else {}
    whole = Settings(**LEAST, method=method, training={"save_steps": 0.5, "report_to": "none"}, **task)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(vars(whole)))
    assert Settings.read(tmp_path / "s.yaml") == whole
    with pytest.raises(ValidationError, match="frozen"):
        whole.r = 3


def test_changes_take_the_place_of_what_the_file_says():
    given = Settings.read(PAPER, method="lora", output=None, strict=True)
    assert (given.method, given.output, given.strict) == ("lora", Settings.read(PAPER).output, True)
    assert given.adapter().lora_alpha == 8


def test_the_tied_method_is_the_preset():
    config = Settings(**LEAST, method="mixlora_tied").adapter()
    assert config == ConditionalMixLoRAConfig.tied(dropout=0.05, task_type="CAUSAL_LM")
    assert Settings.read(PAPER, method="mixlora_tied").adapter().conditioning == "tied"


def test_settings_of_the_paper():
    given = Settings.read(PAPER)
    config, training = given.adapter(), given.training
    assert (config.r, config.num_factors, config.scaling) == (4, 16, 8)
    assert training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * 4 == 128
    assert (training["learning_rate"], training["num_train_epochs"], given.template) == (4e-5, 3, "v1")
