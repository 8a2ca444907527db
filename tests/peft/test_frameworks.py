"""TRL's command line and ms-swift's plug-in train a tiny model, and what they saved loads again."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_llava import shipped

from .models import build

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'integration'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
WORDS = [f"w{number}" for number in range(3, 96)]


def write_model(folder):
    """A model with its tokenizer, one word a token, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{word: number for number, word in enumerate(WORDS, 3)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    build().save_pretrained(folder)


def check_adapter(folder, model_folder, **expected):
    """The configuration is the wanted one, every lora_B has left zero, and the model loads with it and answers
    otherwise than without."""
    weights = load_file(folder / "adapter_model.safetensors")
    trained = {name: tensor for name, tensor in weights.items() if name.endswith("lora_B")}
    assert len(trained) == 14 and all(tensor.any() for tensor in trained.values())
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.tensor([[1, 5, 9, 30, 31]])
    before = base(ids).logits
    model = PeftModel.from_pretrained(base, folder)
    config = model.peft_config["default"]
    assert isinstance(config, ConditionalMixLoRAConfig)
    assert {name: getattr(config, name) for name in expected} == expected
    assert not torch.equal(model(ids).logits, before)


@pytest.mark.slow
def test_trl_trains_from_a_yaml_file_and_arguments(tmp_path):
    pytest.importorskip("trl")
    write_model(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"w5 w9 w{30 + n} ", "completion": f"w{50 + n} w{51 + n}"} for n in range(8)]
    (tmp_path / "data/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {
        "model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tmp_path / "data"), "dtype": "float32",
        "output_dir": str(tmp_path / "out"), "max_steps": 3, "learning_rate": 0.01, "per_device_train_batch_size": 4,
        "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": True, "mixlora_r": 2,
        "mixlora_num_factors": 6,
    }  # fmt: skip
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(given))
    command = [sys.executable, "-m", "mixlora_llava.frameworks.trl_sft", "--config", str(tmp_path / "sft.yaml")]

    def run(*arguments):
        return subprocess.run([*command, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=500)

    done = run("--mixlora_preset", "tied", "--mixlora_dropout", "0.1")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {"r": 2, "num_factors": 6, "conditioning": "tied", "gate": "normalized", "pool": "text", "balance": 0.3}
    check_adapter(tmp_path / "out", tmp_path / "model", dropout=0.1, **expected)
    done = run("--use_peft")
    assert done.returncode != 0 and "use_peft asks for LoRA" in done.stderr


class PeftTuner:
    """What ms-swift 4.6's class of that name does with a model of peft, for where ms-swift is not installed."""

    @staticmethod
    def save_pretrained(model, save_directory, state_dict=None, safe_serialization=True, **kwargs):
        model.save_pretrained(save_directory, selected_adapters=["default"], **kwargs)

    @staticmethod
    def from_pretrained(model, model_id, **kwargs):
        return PeftModel.from_pretrained(model, model_id, **kwargs)


@pytest.fixture
def plugin(monkeypatch):
    """The plug-in, imported by its path as ms-swift does, with ms-swift's own classes where it is installed."""
    if importlib.util.find_spec("swift") is None:
        for name in ("swift", "swift.tuner_plugin"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["swift.tuner_plugin"].PeftTuner, sys.modules["swift.tuner_plugin"].tuners_map = PeftTuner, {}
    spec = importlib.util.spec_from_file_location("plugin", shipped.path("ms_swift_plugin"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ms_swifts_tuner_adapts_saves_and_loads(plugin, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLORA_SETTINGS", '{"r": 2, "num_factors": 6, "init_weights": false}')
    tuner = plugin.tuners_map["mixlora"]
    torch.manual_seed(0)
    base = build()
    base.save_pretrained(tmp_path / "model")
    model = tuner.prepare_model(None, base)
    assert all(p.requires_grad == ("mixlora" in name) for name, p in model.named_parameters())
    tuner.save_pretrained(model, str(tmp_path / "out"), state_dict=None)
    check_adapter(tmp_path / "out", tmp_path / "model", r=2, num_factors=6)
    again = tuner.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out", is_trainable=True
    )
    assert any(p.requires_grad for p in again.parameters())
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("text", "message"), [("r=4", "must be JSON"), ("[4]", "an object of settings")])
def test_ms_swifts_settings_are_refused(plugin, monkeypatch, text, message):
    monkeypatch.setenv("MIXLORA_SETTINGS", text)
    with pytest.raises(ValueError, match=message):
        plugin.MixLoRATuner.prepare_model(None, build())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("swift") is None, reason="ms-swift is not installed")
def test_swift_sft_trains_with_the_plug_in(tmp_path):
    """The whole of ms-swift's command, where it is installed; its pins keep it out of this project's environment."""
    write_model(tmp_path / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"w5 w{30 + n}"}, {"role": "assistant", "content": f"w{50 + n}"}]}
        for n in range(8)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        sys.executable, "-m", "swift.cli.sft", "--tuner_type", "mixlora", "--external_plugins",
        str(shipped.path("ms_swift_plugin")), "--model", str(tmp_path / "model"), "--model_type", "llama",
        "--template", "default", "--dataset", str(tmp_path / "data.jsonl"), "--torch_dtype", "float32", "--max_steps",
        "3", "--learning_rate", "0.01", "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "out"),
        "--report_to", "none", "--use_cpu", "true", "--use_logits_to_keep", "false", "--split_dataset_ratio", "0",
        "--add_version", "false",
    ]  # fmt: skip
    settings = {"MIXLORA_SETTINGS": '{"r": 2, "num_factors": 6}', "USE_HF": "1"}
    done = subprocess.run(command, env=ENVIRONMENT | settings, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    check_adapter(tmp_path / "out/checkpoint-3", tmp_path / "model", r=2, num_factors=6)
