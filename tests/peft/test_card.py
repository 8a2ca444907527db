"""The model card beside a saved adapter, and the version in its configuration."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import transformers
from huggingface_hub import ModelCard
from peft import PeftConfig

from mixlora_kernels import __version__
from mixlora_kernels.peft import ConditionalMixLoRAConfig

from .models import TEXT, adapt, build, needs_transformers_adapters

ROOT = Path(__file__).parents[2]


@pytest.fixture
def saved(tmp_path):
    model = build()
    model.name_or_path = "someone/base"
    adapted = adapt(model, r=3, num_factors=7, dropout=0.25, target_modules=["q_proj", "k_proj"])
    adapted.peft_config["default"].base_model_name_or_path = "someone/base"
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    return adapted, tmp_path


def test_what_the_card_says(saved):
    card = ModelCard.load(saved[1] / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == "someone/base"
    text = card.text
    assert "Model ID" not in text and "More Information Needed" not in text  # nothing of peft's empty card
    assert "# A MixLoRA adapter for someone/base" in text
    for row in (
        "| `r` | `3` |",
        "| `num_factors` | `7` |",
        "| `dropout` | `0.25` |",
        "| `gate` | `straight_through` |",
    ):
        assert row in text
    assert "| `target_modules` | `['k_proj', 'q_proj']` |" in text
    for package, installed in {
        "mixlora_kernels": __version__,
        "PEFT": peft.__version__,
        "transformers": transformers.__version__,
        "torch": version("torch"),  # torch.__version__ names the build as well
    }.items():
        assert text.count(f"- {package} {installed}") == 1
    assert "KeyError 'CONDITIONAL_MIXLORA'" in text and "10.18653/v1/2024.acl-long.38" in text


@pytest.mark.slow
@pytest.mark.parametrize("imported", [True, False])
def test_the_lines_that_load_it_are_right(saved, imported):
    """Run as they stand in the card, in a process that knows nothing of this package; and without the import."""
    lines = re.search("```python\n(.*?)```", (saved[1] / "README.md").read_text(), re.S)[1]
    lines = lines.replace("FOLDER", repr(str(saved[1])))
    if not imported:
        lines = lines.replace("import mixlora_kernels.peft", "")
    script = (
        f"from transformers import LlamaConfig, LlamaForCausalLM\nmodel = LlamaForCausalLM(LlamaConfig(**{TEXT}))\n"
    )
    run = subprocess.run([sys.executable, "-c", script + lines], cwd=ROOT, capture_output=True, text=True, check=False)
    if imported:
        assert run.returncode == 0, run.stderr
    else:
        assert "KeyError: 'CONDITIONAL_MIXLORA'" in run.stderr


def test_what_was_written_by_hand_stays(saved):
    adapted, folder = saved
    file = folder / "README.md"
    file.write_text(file.read_text() + "\n## Notes\n\nTrained on my own data.\n")
    adapted.peft_config["default"].dropout = 0.5
    adapted.save_pretrained(folder, save_embedding_layers=False)
    text = file.read_text()
    assert "Trained on my own data." in text
    assert "| `dropout` | `0.5` |" in text and "`0.25`" not in text
    assert text.count("## Load it") == text.count("## Citation") == 1
    file.write_text("---\nlicense: mit\n---\n\nA card of my own.\n")
    adapted.save_pretrained(folder, save_embedding_layers=False)
    card = ModelCard.load(file)
    assert card.data.license == "mit" and card.text.strip().startswith("A card of my own.")
    assert card.text.count("## Load it") == 1


def test_every_adapter_has_its_own(saved):
    adapted, folder = saved
    adapted.add_adapter("second", ConditionalMixLoRAConfig(r=1, num_factors=2, task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    assert "| `num_factors` | `7` |" in (folder / "README.md").read_text()
    assert "| `num_factors` | `2` |" in (folder / "second" / "README.md").read_text()


@needs_transformers_adapters
def test_transformers_writes_it_too(tmp_path):
    model = build()
    model.add_adapter(ConditionalMixLoRAConfig(r=2, num_factors=4))
    model.save_pretrained(tmp_path)
    assert "| `num_factors` | `4` |" in (tmp_path / "README.md").read_text()


def test_the_configuration_records_the_version_that_wrote_it(saved):
    file = saved[1] / "adapter_config.json"
    assert json.loads(file.read_text())["mixlora_kernels_version"] == __version__
    file.write_text(file.read_text().replace(f'"mixlora_kernels_version": "{__version__}"', '"r": 3'))
    config = PeftConfig.from_pretrained(saved[1])  # written before there was a record
    assert config.mixlora_kernels_version == __version__
    config.mixlora_kernels_version = "0.0.1"
    config.save_pretrained(saved[1])
    assert json.loads(file.read_text())["mixlora_kernels_version"] == __version__


def test_an_older_version_is_not_warned_of(saved, recwarn):
    file = saved[1] / "adapter_config.json"
    file.write_text(file.read_text().replace(__version__, "0.0.1"))
    assert PeftConfig.from_pretrained(saved[1]).mixlora_kernels_version == "0.0.1"
    assert not [entry for entry in recwarn if "mixlora_kernels" in str(entry.message)]
