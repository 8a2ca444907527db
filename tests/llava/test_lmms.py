"""The plug-in against a stand-in for lmms-eval, of whose interface it uses a base class and a manifest."""

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from integration.llava import digits, small
from integration.llava.conversation import TEMPLATES, prompt

TASKS = Path(__file__).parents[2] / "integration/llava/lmms_tasks"


@dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str


@dataclass
class Request:
    args: tuple


@pytest.fixture
def stand_in(monkeypatch):
    class Base:
        def __init__(self):
            self.task_dict = {}

    for name in (
        "lmms_eval",
        "lmms_eval.api",
        "lmms_eval.api.model",
        "lmms_eval.models",
        "lmms_eval.models.registry_v2",
    ):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Base
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = Manifest
    yield
    sys.modules.pop("integration.llava.lmms_model", None)


@pytest.fixture
def model(stand_in, tmp_path):
    from integration.llava import lmms

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
    setup = (TASKS.parents[2] / "setup.py").read_text()
    assert "lmms_eval.models" in setup and "mixlora_llava = integration.llava.lmms:manifest" in setup


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
    from integration.llava.generate import build_prompt

    assert build_prompt("red", "bare", image=False) == "USER: red ASSISTANT:"


def test_stop_words(stand_in):
    from integration.llava.lmms_model import cut

    assert cut("seven. And more", [".", "And"]) == "seven" and cut("seven", ["\n\n"]) == "seven"


def test_log_likelihood_by_hand(model):
    asked = Request(("Is the digit odd or even?", "odd", lambda doc: [doc["image"]], 0, "t", "test"))
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
