"""The plug-in in lmms-eval, or, without it, against a stand-in for what it uses: a base class and a manifest."""

import importlib
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from mixlora_llava.data.conversation import TEMPLATES, prompt
from mixlora_llava.example import digits
from mixlora_llava.model import small

TASKS = Path(__file__).parents[2] / "integration/mixlora_llava/lmms/tasks"


@dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str


@dataclass
class Request:
    args: tuple


@pytest.fixture
def harness(monkeypatch):
    """lmms-eval, or a stand-in for it."""
    try:
        importlib.import_module("lmms_eval.api.model")
    except ImportError:
        names = (
            "lmms_eval",
            "lmms_eval.api",
            "lmms_eval.api.model",
            "lmms_eval.models",
            "lmms_eval.models.registry_v2",
        )
        for name in names:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        base = type("lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {})})
        sys.modules["lmms_eval.api.model"].lmms = base
        sys.modules["lmms_eval.models.registry_v2"].ModelManifest = Manifest
    yield
    sys.modules.pop("mixlora_llava.lmms.model", None)


@pytest.fixture
def model(harness, tmp_path):
    from mixlora_llava import lmms

    small.save(*small.small_llava(digits.texts(), width=24, layers=2), tmp_path / "base")
    module, _, name = lmms.manifest().simple_class_path.rpartition(".")
    cls = getattr(__import__(module, fromlist=[name]), name)
    model = cls(str(tmp_path / "base"), template="bare", batch_size="2", device="cpu")
    images = [Image.new("RGB", (16, 16), (40 * i, 0, 255 - 40 * i)) for i in range(4)]
    model.task_dict["t"] = {"test": [{"image": image} for image in images]}
    return model


def request(number, text, **options):
    return Request((text, options, lambda doc: [doc["image"]], number, "t", "test"))


def test_entry_point_is_declared():
    setup = (TASKS.parents[3] / "setup.py").read_text()
    assert "lmms_eval.models" in setup and "mixlora_llava = mixlora_llava.lmms:manifest" in setup


def test_answers_keep_their_order_whatever_the_batches(model):
    requests = [
        request(0, "Describe the image.", max_new_tokens=3),
        request(1, "Is the digit odd or even?", max_new_tokens=5),
        request(2, "Describe the image.", max_new_tokens=3),
        request(3, "Is the digit odd or even?", max_new_tokens=3),
    ]
    together = model.generate_until(requests)
    assert together == [model.generate_until([one])[0] for one in requests]
    assert len(together[1].split()) == 5


def test_text_is_cut_at_stop_words():
    from mixlora_llava.model.generate import build_prompt

    assert build_prompt("red", "bare", image=False) == "USER: red ASSISTANT:"


def test_stop_words(harness):
    from mixlora_llava.lmms.model import cut

    assert cut("seven. And more", [".", "And"]) == "seven" and cut("seven", ["\n\n"]) == "seven"


# As a text, as one of several choices, and as a function of the document: lmms-eval's three ways.
@pytest.mark.parametrize("continuation", ["odd", " odd", lambda doc: "odd"])
def test_log_likelihood_by_hand(model, continuation):
    asked = Request(("Is the digit odd or even?", continuation, lambda doc: [doc["image"]], 0, "t", "test"))
    value, greedy = model.loglikelihood([asked])[0]
    text = prompt("Is the digit odd or even?", TEMPLATES["bare"]) + " odd"
    inputs = model.processor(text=[text], images=[model.task_dict["t"]["test"][0]["image"]], return_tensors="pt")
    with torch.no_grad():
        logits = model.model(**{k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values")}).logits[0, -2]
    word = model.processor.tokenizer.convert_tokens_to_ids("odd")
    assert value == pytest.approx(float(logits.log_softmax(-1)[word]), abs=1e-5)  # float32 sums in another order
    assert greedy == bool(logits.argmax() == word)


def test_refuses_two_images_and_rounds(model):
    two = Request(("x", {}, lambda doc: [doc["image"]] * 2, 3, "t", "test"))
    with pytest.raises(ValueError, match=r"t 3: .* one image, got 2"):
        model.generate_until([two])
    with pytest.raises(NotImplementedError, match="single questions"):
        model.generate_until_multi_round([two])


def test_lmms_eval_runs_an_adapter_on_the_tasks(tmp_path, monkeypatch):
    """With the real lmms-eval: model by its manifest, tasks by their files, and accuracies of known value."""
    evaluator = pytest.importorskip("lmms_eval.evaluator", exc_type=ImportError)
    from datasets import config as datasets_config
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from mixlora_kernels.peft import ConditionalMixLoRAConfig
    from mixlora_llava import lmms
    from mixlora_llava.data.images import load_image
    from mixlora_llava.model.generate import answer, build_prompt
    from mixlora_llava.model.load import load_adapter, load_llava
    from mixlora_llava.model.patch import patch_llava
    from mixlora_llava.scoring.predict import read_questions

    digits.write(tmp_path / "data", per_task=4, held_out=6, copies=1)
    small.save(*small.small_llava(digits.texts(), width=24, layers=2), tmp_path / "base")
    base, processor = load_llava(tmp_path / "base")
    config = ConditionalMixLoRAConfig(r=2, num_factors=4, init_weights=False, task_type="CAUSAL_LM")
    patch_llava(base, config).model.save_pretrained(tmp_path / "adapter")
    adapted, _ = load_adapter(load_llava(tmp_path / "base")[0], tmp_path / "adapter")
    questions = read_questions(tmp_path / "data/eval/side.jsonl")
    images = tmp_path / "data/images"
    for row in questions[:4]:  # two thirds of the targets are what the model says
        picture = load_image(images / row["image_path"])
        row["target"] = answer(adapted, processor, [build_prompt(row["prompt"], "bare")], [picture])[0]
    names = [path.stem for path in TASKS.glob("*.yaml") if path.stem != "mixlora_unseen"]
    (tmp_path / "data/mm_tasks").mkdir()
    for name in names:
        (tmp_path / "data/mm_tasks" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, questions)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXLORA_EVAL_IMAGES", str(images))
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    MODEL_REGISTRY_V2.register_manifest(lmms.manifest())  # what the entry point does for an installed package
    found = evaluator.simple_evaluate(
        model="mixlora_llava",
        model_args=f"pretrained={tmp_path / 'base'},adapter={tmp_path / 'adapter'},template=bare,device=cpu",
        tasks=["mixlora_unseen"],
        batch_size=4,
        task_manager=TaskManager(include_path=str(TASKS), model_name="mixlora_llava"),
    )
    accuracies = {name: row["accuracy,none"] for name, row in found["results"].items() if "accuracy,none" in row}
    assert accuracies == {f"mixlora_{name}": pytest.approx(2 / 3) for name in names}


class Loader(yaml.SafeLoader):
    pass


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_task_files_fit_the_released_ones(tmp_path, monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("lmms_task_utils", TASKS / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    default = yaml.load((TASKS / "_default_yaml").read_text(), Loader)
    for field in ("doc_to_visual", "doc_to_text", "process_results"):
        assert callable(getattr(utils, default[field].removeprefix("utils.")))
    files = {path.stem: yaml.safe_load(path.read_text()) for path in TASKS.glob("*.yaml")}
    group = files.pop("mixlora_unseen")
    assert sorted(group["task"]) == sorted(entry["task"] for entry in files.values())
    for name, entry in files.items():
        assert entry["dataset_kwargs"]["data_files"]["test"].endswith(f"/{name}.jsonl")
    Image.new("CMYK", (4, 4)).save(tmp_path / "a.jpg")
    monkeypatch.setenv("MIXLORA_EVAL_IMAGES", str(tmp_path))
    doc = {"image_path": "a.jpg", "prompt": "Which?", "target": "Seven"}
    assert utils.doc_to_visual(doc)[0].mode == "RGB" and utils.doc_to_text(doc) == "Which?"
    assert utils.process_results(doc, ["seven."]) == {"accuracy": 1.0}
    assert utils.process_results(doc, ["six"]) == {"accuracy": 0.0}
