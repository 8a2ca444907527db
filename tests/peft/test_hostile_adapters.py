"""Adapter folders that nobody should trust: each is refused, and the model is bit for bit as it was.

Every case goes through peft's two ways of loading and transformers' own, with safetensors and with ``.bin`` files.
"""

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load, save_file

from mixlora_kernels import __version__
from mixlora_kernels.peft import ConditionalMixLoRAConfig, MixLoRALayer

from .models import TRANSFORMERS_LOADS, adapt, build, needs_transformers_adapters, prompts

IDS = torch.stack([tokens[:6] for tokens in prompts(2)])
CONFIG, SAFE, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MODEL = "base_model.model.model"
QUERY = f"{MODEL}.layers.0.self_attn.q_proj.mixlora_adapter"
WAYS = ("from_pretrained", "load_adapter", *(["transformers"] if TRANSFORMERS_LOADS else []))


def everything(model) -> dict:
    """All that a refusal must not change."""
    tensors = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    layers = {
        name: (list(module.mixlora_adapter), list(module.configs), module.active_adapter)
        for name, module in model.named_modules()
        if isinstance(module, MixLoRALayer)
    }
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    known = sorted(model.peft_config) if hasattr(model, "peft_config") else None
    flags = getattr(model, "_hf_peft_config_loaded", None)
    return {"tensors": tensors, "rest": (trained, modules, hooks, layers, known, flags), "logits": logits}


def assert_same(model, before: dict) -> None:
    after = everything(model)
    assert after["rest"] == before["rest"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (place, tensor) in before["tensors"].items():
        assert after["tensors"][name][0] == place and torch.equal(after["tensors"][name][1], tensor), name
    assert torch.equal(after["logits"], before["logits"])


def load_by(way: str, folder: Path):
    """A model, and what tries to load the folder into it."""
    if way == "from_pretrained":
        model = build()
        return model, lambda: PeftModel.from_pretrained(model, folder)
    if way == "load_adapter":
        model = adapt(build())
        return model, lambda: model.load_adapter(folder, "second")
    model = build()
    options = {"use_safetensors": False} if (folder / BIN).exists() else {}
    return model, lambda: model.load_adapter(str(folder), adapter_name="first", **options)


def check_refused(folder: Path, error, message: str, ways=WAYS) -> None:
    for way in ways:
        model, attempt = load_by(way, folder)
        before = everything(model)
        with pytest.raises(error, match=message):
            attempt()
        assert_same(model, before)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    adapt(build(), target_modules=["q_proj"]).save_pretrained(folder)
    return folder


@pytest.fixture(params=[SAFE, BIN])
def folder(good, tmp_path, request):
    """A sound adapter, its weights in one of the two formats."""
    (tmp_path / CONFIG).write_text((good / CONFIG).read_text())
    write(tmp_path / request.param, weights_of(good))
    return tmp_path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / SAFE
    return load(file.read_bytes()) if file.exists() else torch.load(folder / BIN)


def write(file: Path, weights: dict[str, torch.Tensor]) -> None:
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save(weights, file)


def rewrite(folder: Path, **changed) -> None:
    """Other weights, by their keys; None takes one out."""
    weights = {key: value for key, value in (weights_of(folder) | changed).items() if value is not None}
    write(next(folder.glob("adapter_model.*")), weights)


def configure(folder: Path, **settings) -> None:
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | settings))


def test_the_sound_adapter_loads(folder):
    for way in WAYS:
        model, attempt = load_by(way, folder)
        before = everything(model)["logits"]
        adapted = attempt()
        adapted = adapted if way == "from_pretrained" else model
        if way == "load_adapter":
            adapted.set_adapter("second")
        # A bound from below: the adapter was made so strong that it shows.
        assert not torch.allclose(everything(adapted)["logits"], before, atol=1e-3)


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
    "target_modules no expression": ({"target_modules": "(q_proj"}, "target_modules is no regular expression"),
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


def query(**tensors) -> dict[str, torch.Tensor]:
    return {f"{QUERY}.{name}": tensor for name, tensor in tensors.items()}


A = torch.randn(6, 32)
TENSORS = {
    "a frozen weight": ({f"{MODEL}.embed_tokens.weight": torch.zeros(96, 32)}, "unknown keys: .*embed_tokens"),
    "a frozen weight inside of an adapted layer": (
        {f"{MODEL}.layers.0.self_attn.q_proj.base_layer.weight": torch.zeros(32, 32)}, "unknown keys: .*base_layer"
    ),
    "the head": ({"base_model.model.lm_head.weight": torch.zeros(96, 32)}, r"unknown keys: .*lm_head\.weight"),
    "a tensor of nobody": ({"x": torch.zeros(1)}, "unknown keys: .*['\"]x"),
    "a layer that is not there": ({QUERY.replace("layers.0", "layers.9") + ".lora_A": A}, r"unknown keys: .*layers\.9"),
    "another adapter's name in the key": ({f"{QUERY}.second.lora_A": A.clone()}, r"unknown keys: .*second\.lora_A"),
    "a missing tensor": (query(lora_A=None), r"missing keys: .*q_proj\.mixlora_adapter\.(default\.)?lora_A"),
    "a shape transposed": (query(lora_A=A.T.contiguous()), r"other shapes: .*\(32, 6\) in the file, \(6, 32\)"),
    "a scalar": (query(lora_A=torch.tensor(1.0)), r"other shapes: .*\(\) in the file"),
    "an empty tensor": (query(lora_A=torch.empty(0, 32)), r"other shapes: .*\(0, 32\) in the file"),
    "integers": (query(lora_A=A.long()), "other dtypes: .*lora_A: (I64|int64)"),
    "bools": (query(lora_A=A > 0), "other dtypes: .*lora_A: (BOOL|bool)"),
    "float8": (query(lora_A=A.to(torch.float8_e4m3fn)), "other dtypes: .*lora_A: (F8_E4M3|float8_e4m3fn)"),
    "complex": (query(lora_A=A.to(torch.complex64)), "other dtypes: .*lora_A: (C64|complex64)"),
    "one NaN": (query(lora_A=A.index_fill(0, torch.tensor(5), float("nan"))), "Not finite: .*q_proj.*lora_A"),
    "one infinity": (query(router_AB=torch.full((2, 6, 32), float("inf"))), "Not finite: .*q_proj.*router_AB"),
    "finite in float64 alone": (query(lora_B=torch.full((6, 32), 1e300, dtype=torch.float64)), "Not finite: .*lora_B"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(folder, case):
    changed, message = TENSORS[case]
    rewrite(folder, **changed)
    check_refused(folder, ValueError, message)


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_into_an_adapter_that_is_there(folder, case):
    changed, message = TENSORS[case]
    rewrite(folder, **changed)
    model = adapt(build(), target_modules=["q_proj"])
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, "default")
    assert_same(model, before)


@needs_transformers_adapters
@pytest.mark.parametrize("case", TENSORS)
def test_tensors_without_a_file(good, case):
    """transformers' own loading takes tensors, too."""
    changed, message = TENSORS[case]
    weights = {key: value for key, value in (weights_of(good) | changed).items() if value is not None}
    model = build()
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(peft_config=PeftConfig.from_pretrained(good), adapter_state_dict=weights)
    assert_same(model, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floating_dtypes_load(folder, dtype):
    rewrite(folder, **{key: value.to(dtype) for key, value in weights_of(folder).items()})
    for way in WAYS:
        load_by(way, folder)[1]()


def header_of(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(file: Path, header: dict | str, body: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def overlapping(file):
    header, body = header_of(file)
    names = [name for name in header if name.endswith("lora_A")]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    with_header(file, header, body)


def beyond_the_end(file):
    header, body = header_of(file)
    header[f"{QUERY}.lora_A"]["data_offsets"] = [0, 10**15]
    with_header(file, header, body)


def wrong_dtype(file):
    header, body = header_of(file)
    header[f"{QUERY}.lora_A"]["dtype"] = "F33"
    with_header(file, header, body)


def overflowing_shape(file):
    header, body = header_of(file)
    header[f"{QUERY}.lora_A"]["shape"] = [2**62, 2**62]
    with_header(file, header, body)


def huge_header(file):
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")


def no_json(file):
    with_header(file, "{" * 1000, b"")


def a_key_twice(file):
    header, body = header_of(file)
    entry = header[f"{QUERY}.lora_A"] | {"shape": [1, 1]}
    with_header(file, json.dumps(header)[:-1] + f', "{QUERY}.lora_A": {json.dumps(entry)}}}', body)


def a_folder(file):
    file.unlink()
    file.mkdir()


def a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def a_link_to_nowhere(file):
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def a_link_elsewhere(file):
    file.unlink()
    file.symlink_to("/dev/zero")


BROKEN = {
    "overlapping offsets": overlapping,
    "offsets beyond the end": beyond_the_end,
    "an unknown dtype": wrong_dtype,
    "a shape that overflows": overflowing_shape,
    "a header of an exabyte": huge_header,
    "a header that is no JSON": no_json,
    "a key that is there twice": a_key_twice,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "a folder in its place": a_folder,
    "a pipe in its place": a_pipe,
    "a link to nowhere": a_link_to_nowhere,
    "a link to a device": a_link_elsewhere,
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_safetensors(good, tmp_path, case):
    (tmp_path / CONFIG).write_text((good / CONFIG).read_text())
    (tmp_path / SAFE).write_bytes((good / SAFE).read_bytes())
    BROKEN[case](tmp_path / SAFE)
    check_refused(tmp_path, ValueError, "truncated or corrupt|is no file|has neither")


class Attack:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def bins(file: Path, case: str) -> None:
    whole = torch.load(file)
    if case == "code":
        torch.save(whole | {"x": Attack()}, file)
    elif case == "a list":
        torch.save(list(whole.values()), file)
    elif case == "numbers for names":
        torch.save(dict(enumerate(whole.values())), file)
    elif case == "a sparse tensor":
        torch.save(whole | {f"{QUERY}.lora_A": whole[f"{QUERY}.lora_A"].to_sparse()}, file)
    elif case == "a string for a tensor":
        torch.save(whole | {f"{QUERY}.lora_A": "lora_A"}, file)
    elif case == "the old format":
        torch.save(whole, file, _use_new_zipfile_serialization=False)
    elif case == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif case == "empty":
        file.write_bytes(b"")
    else:  # an archive of something else
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("data.pkl", b"nothing")


@pytest.mark.parametrize(
    "case",
    ["code", "a list", "numbers for names", "a sparse tensor", "a string for a tensor", "the old format", "truncated",
     "empty", "a zip file"],
)  # fmt: skip
def test_broken_bin(good, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / CONFIG).write_text((good / CONFIG).read_text())
    write(tmp_path / BIN, weights_of(good))
    bins(tmp_path / BIN, case)
    check_refused(tmp_path, ValueError, "is not what torch.save writes|weights are (dense )?tensors by name")
    assert not (tmp_path / "pwned").exists()


def test_no_weights(good, tmp_path):
    (tmp_path / CONFIG).write_text((good / CONFIG).read_text())
    check_refused(tmp_path, ValueError, f"has neither {SAFE} nor {BIN}")


@needs_transformers_adapters
def test_a_subfolder(good, tmp_path):
    """What peft and transformers find in a subfolder is what is looked at."""
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / CONFIG).write_text((good / CONFIG).read_text())
    write(inside / SAFE, weights_of(good))
    PeftModel.from_pretrained(build(), tmp_path, subfolder="inside")
    adapt(build()).load_adapter(tmp_path, "second", subfolder="inside")
    build().load_adapter(str(tmp_path), adapter_kwargs={"subfolder": "inside"})
    rewrite(inside, **query(lora_A=None))
    for attempt in (
        lambda model: PeftModel.from_pretrained(model, tmp_path, subfolder="inside"),
        lambda model: model.load_adapter(str(tmp_path), adapter_kwargs={"subfolder": "inside"}),
    ):
        model = build()
        before = everything(model)
        with pytest.raises(ValueError, match="missing keys"):
            attempt(model)
        assert_same(model, before)


@needs_transformers_adapters
def test_a_projector_that_is_not_the_models(tmp_path):
    """modules_to_save: its names, shapes, dtypes and values are looked at like the adapter's own."""
    adapt(build("llava"), target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]).save_pretrained(
        tmp_path
    )
    key = "base_model.model.model.multi_modal_projector.linear_1.weight"
    sound = weights_of(tmp_path)
    other = key.replace("linear_1", "linear_7")
    for changed, message in (
        ({key: None}, "missing keys: .*linear_1.weight"),
        ({key: None, other: sound[key]}, "missing keys: .*linear_1.weight.*unknown keys: .*linear_7"),
        ({key: sound[key][:-1].clone()}, "other shapes: .*linear_1.weight"),
        ({key: sound[key].long()}, "other dtypes: .*linear_1.weight"),
        ({key: sound[key] * float("nan")}, "Not finite: .*linear_1.weight"),
        ({key: None, "base_model.model.model.vision_tower.weight": sound[key]}, "unknown keys: .*vision_tower"),
    ):
        write(tmp_path / SAFE, {name: value for name, value in (sound | changed).items() if value is not None})
        for attempt in (
            lambda model: PeftModel.from_pretrained(model, tmp_path),
            lambda model: model.load_adapter(str(tmp_path)),
        ):
            model = build("llava")
            names = [(name, type(module)) for name, module in model.named_modules()]
            tensors = {name: value.clone() for name, value in model.state_dict().items()}
            with pytest.raises(ValueError, match=message):
                attempt(model)
            assert [(name, type(module)) for name, module in model.named_modules()] == names
            assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


@needs_transformers_adapters
def test_an_injection_that_fails_half_way():
    """modules_to_save that peft cannot wrap, found out when the adapters stand already."""
    for model in (build(), adapt(build())):
        before = everything(model)
        config = ConditionalMixLoRAConfig(r=1, num_factors=2, target_modules=["lm_head"], modules_to_save=["layers"])
        config.task_type = "CAUSAL_LM"
        with pytest.raises(TypeError, match="ModuleList"):
            (model.add_adapter("second", config) if hasattr(model, "peft_config") else model.add_adapter(config))
        if not hasattr(model, "peft_config"):
            model._hf_peft_config_loaded = before["rest"][-1]  # transformers sets it before it asks for the adapter
        assert_same(model, before)


def test_settings_of_a_saved_adapter_for_a_new_one(good):
    """A configuration that was read from a folder is no loading: another model gets an adapter of its own."""
    config = ConditionalMixLoRAConfig.from_pretrained(good)
    config.num_factors, config.inference_mode = 9, False
    model = get_peft_model(build(), config)
    layer = next(module for module in model.modules() if isinstance(module, MixLoRALayer))
    assert layer.mixlora_adapter["default"].lora_A.shape == (9, 32)


def test_keys_that_are_mapped(good, tmp_path):
    """peft renames keys for older names of a model; they are compared after that."""
    (tmp_path / CONFIG).write_text((good / CONFIG).read_text())
    old = {key.replace("model.layers", "decoder.layers"): value for key, value in weights_of(good).items()}
    save_file(old, tmp_path / SAFE)
    mapping = {r"^decoder\.layers": "model.layers"}
    PeftModel.from_pretrained(build(), tmp_path, key_mapping=mapping)
    check_refused(tmp_path, ValueError, "missing keys: .*model.layers.*unknown keys: .*decoder.layers", WAYS[:2])


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
from tests.peft.test_hostile_adapters import load_by
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


@pytest.mark.parametrize("way", WAYS)
def test_a_million_factors_cost_nothing(folder, way):
    """The promise is 5 s and 500 MB; a process of its own, so that the peak of its memory is the refusal's."""
    configure(folder, num_factors=1_000_000, r=1_000)
    command = [sys.executable, "-c", EXPRESSION, way, str(folder)]
    root = Path(__file__).parents[2]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    word, seconds, megabytes, *message = output.splitlines()[-1].split()
    assert word == "refused" and "(1000000," in " ".join(message)
    assert float(seconds) < 5 and float(megabytes) < 500
