"""Converted checkpoints compute what the released code computes, restated here from its tensors by key."""

import json
import pickle
import re

import pytest
import torch
from peft import LoraConfig, PeftModel

from mixlora_kernels import RoutingContext
from mixlora_kernels.peft import ConditionalMixLoRAConfig
from mixlora_llava.checkpoints import convert, reading
from mixlora_llava.command.main import main
from mixlora_llava.model.patch import patch_llava

from .tiny import LAYERS, linear_sizes, released_checkpoint, tiny_llava

E, R = 12, 3  # more than ten factors: "10" comes before "2" where numbers are sorted as words


def released_layer(state, name, x, conditional):
    """The update of one layer, an instance at a time, with the dense product that the released code builds."""
    outputs = []
    for tokens in x:
        mean = tokens.mean(0)  # every token, padding too
        a = (state[name + "cmoa_selector.loraA_selector.weight"] @ mean).topk(R).indices.tolist()
        A = torch.cat([state[f"{name}lora_A.default.{e}"] for e in a])  # [r, d_in]
        extra = name + ("cmoa_loarB_extra_selector." if conditional else "cmoa_selector.")
        score = (state[extra + "loraB_selector.weight"] @ mean).softmax(0)
        if conditional:
            table = state[extra + "loraA_param2loraB_selector.weight"]  # [E, r * d_in], slot by slot
            slots = table.split(A.shape[1], dim=1)
            # The two sums run apart: over the entries of a factor, and over the columns of a slot.
            late = sum((A[i].sum() * slots[i].sum(1)).softmax(0) for i in range(R))
            score = score + late.softmax(0)
        b = score.topk(R).indices.tolist()
        B = torch.cat([state[f"{name}lora_B.default.{e}"] for e in b])  # [r, d_out]
        dense = sum(torch.outer(A[i], B[i]) for i in range(R))  # [d_in, d_out]
        outputs.append(tokens @ state[name + "weight"].T + (2 * E / R) * tokens @ dense)
    return torch.stack(outputs)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["input_lora_a_param", "input"])
def test_reproduces_the_released_computation(tmp_path, kind, shards):
    state = released_checkpoint(tmp_path / "released", kind, E, R, shards)
    report = convert.to_adapter(tmp_path / "released", tmp_path / "adapter")
    model = tiny_llava()
    for layer in range(LAYERS):
        for name in linear_sizes(layer):
            path = name.removeprefix("base_model.model.model.").rstrip(".")
            model.get_submodule(f"model.language_model.{path}").weight.data = state[name + "weight"]
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert report["layers"] == 7 * LAYERS
    for layer in range(LAYERS):
        for name, (_, d_in) in linear_sizes(layer).items():
            path = name.removeprefix("base_model.model.model.").rstrip(".")
            x = torch.randn(4, 6, d_in)
            got = adapted.get_submodule(f"base_model.model.model.language_model.{path}")(x)
            want = released_layer(state, name, x, kind.endswith("param"))
            # The promise is 1e-5 of the output's size, which is about 100 here (scaling 8, factors of unit variance).
            assert (got - want).abs().max() <= 1e-5 * want.abs().max(), name
    projector = adapted.base_model.model.model.multi_modal_projector.linear_1
    projector = projector.modules_to_save["default"]
    assert torch.equal(projector.weight, state["base_model.model.model.mm_projector.weight"])
    assert torch.equal(projector.bias, state["base_model.model.model.mm_projector.bias"])


def test_reproduces_routing_by_task(tmp_path):
    """The routers read the task's embedding, as wide as Vicuna's, in place of the input."""
    state = released_checkpoint(tmp_path / "released", "task_embed", E, R)
    report = convert.to_adapter(tmp_path / "released", tmp_path / "adapter")
    assert report["config"]["routing"] == "task" and report["config"]["conditioning"] == "none"
    name, place = (
        next(iter(linear_sizes(1).items()))[0],
        "base_model.model.model.language_model.layers.1.self_attn.q_proj",
    )
    layer = PeftModel.from_pretrained(tiny_llava(), tmp_path / "adapter").eval().get_submodule(place)
    layer.base_layer.weight.data = state[name + "weight"]
    x, task = torch.randn(4, 6, layer.in_features), torch.randn(4, 3, 4096)
    got, _ = layer.mixlora_adapter["default"](x, layer.base_layer(x), RoutingContext(task=task))
    for tokens, of_task, mine in zip(x, task, got):
        mean = of_task.mean(0)
        a = (state[name + "cmoa_selector.loraA_selector.weight"] @ mean).topk(R).indices.tolist()
        b = (state[name + "cmoa_selector.loraB_selector.weight"] @ mean).topk(R).indices.tolist()
        dense = sum(
            torch.outer(state[f"{name}lora_A.default.{i}"][0], state[f"{name}lora_B.default.{j}"][0])
            for i, j in zip(a, b)
        )
        want = tokens @ state[name + "weight"].T + (2 * E / R) * tokens @ dense
        assert (mine - want).abs().max() <= 1e-5 * want.abs().max()


def test_refuses_other_adapters(tmp_path):
    patch_llava(tiny_llava(), LoraConfig(r=2)).model.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="holds no MixLoRA adapter"):
        convert.to_released(tmp_path / "lora", tmp_path / "back")
    patch_llava(tiny_llava(), ConditionalMixLoRAConfig(r=2, num_factors=4)).model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"no counterpart .* gate='straight_through'"):
        convert.to_released(tmp_path / "ours", tmp_path / "back")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": "prompt"}, "pool='prompt'"),
        ({"decode": "prompt"}, "decode='prompt'"),
        ({"routing": "random", "decode": "prompt"}, "routing='random', .* decode='prompt'"),
        ({"conditioning": "factors"}, "conditioning='factors'"),
    ],
)
def test_refuses_what_the_released_code_does_not_compute(tmp_path, settings, message):
    config = ConditionalMixLoRAConfig.published(r=2, num_factors=4, **settings)
    patch_llava(tiny_llava(), config).model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"no counterpart .*{message}"):
        convert.to_released(tmp_path / "adapter", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_task_adapter_of_any_pool_goes_back(tmp_path):
    """Its routing reads the task's embedding, and no tokens."""
    config = ConditionalMixLoRAConfig(
        r=2, num_factors=4, routing="task", task_dim=8, conditioning="none", gate="binary"
    )
    patch_llava(tiny_llava(), config).model.save_pretrained(tmp_path / "adapter")
    assert convert.to_released(tmp_path / "adapter", tmp_path / "back") == {"layers": 14, "copied": 0}
    assert reading.load(tmp_path / "back/cmoa_args.bin").cond_type == "task_embed"


@pytest.mark.parametrize(("act", "fits"), [("linear", True), ("gelu", False)])
def test_a_trained_projector_of_two_maps_does_not_go_back(tmp_path, act, fits):
    """The released projector is one linear map. The second map and the activation would be lost."""
    model = tiny_llava(projector_hidden_act=act)
    patched = patch_llava(model, ConditionalMixLoRAConfig.published(r=2, num_factors=4), train_projector=True)
    patched.model.save_pretrained(tmp_path / "adapter")
    if fits:
        convert.to_released(tmp_path / "adapter", tmp_path / "back")
        back = torch.load(tmp_path / "back/pytorch_model.bin", weights_only=True)
        trained = model.model.multi_modal_projector.linear_1.modules_to_save["default"]
        assert torch.equal(back["base_model.model.model.mm_projector.weight"], trained.weight)
        return
    with pytest.raises(ValueError, match=r"no place for \(.*linear_2\.weight.*\).*projector_hidden_act='linear'"):
        convert.to_released(tmp_path / "adapter", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_command_refuses_folders_without_a_checkpoint_or_an_adapter(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    released_checkpoint(tmp_path / "released")
    convert.to_adapter(tmp_path / "released", tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    for source, back, message in [
        ("nope", (), "source must be a folder, and .*nope is missing"),
        ("empty", (), "missing: .*empty/cmoa_args.bin"),
        ("empty", ("--back",), "empty holds no adapter"),
        ("adapter", ("--back",), "missing: .*adapter_model.safetensors"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(["convert", str(tmp_path / source), str(tmp_path / "out"), *back])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and re.search(f"convert: error: .*{message}", said)
    assert not (tmp_path / "out").exists()


def test_names_every_unused_key(tmp_path):
    state = released_checkpoint(tmp_path / "released")
    report = convert.to_adapter(tmp_path / "released", tmp_path / "adapter")
    frozen = {key for key in state if key.endswith("_proj.weight")}
    others = {"base_model.model.lm_head.weight", *(key for key in state if "vision_tower" in key)}
    assert set(report["unused"]) == frozen | others


@pytest.mark.parametrize("kind", ["input_lora_a_param", "input", "task_embed", "random"])
def test_back_to_the_released_layout_bit_for_bit(tmp_path, kind):
    state = released_checkpoint(tmp_path / "released", kind)
    convert.to_adapter(tmp_path / "released", tmp_path / "adapter")
    report = convert.to_released(tmp_path / "adapter", tmp_path / "back", base=tmp_path / "released")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    arguments = reading.load(tmp_path / "back" / "cmoa_args.bin")
    assert (arguments.n_experts, arguments.n_selected, arguments.cond_type) == (12, 3, kind)
    assert arguments.lora_alpha == 24
    assert report == {
        "layers": 7 * LAYERS,
        "copied": sum("vision" in k or "lm_head" in k or "_proj.weight" in k for k in state),
    }


def test_layout_of_the_original_llava(tmp_path):
    released_checkpoint(tmp_path / "released")
    convert.to_adapter(tmp_path / "released", tmp_path / "adapter", layout="original")
    from safetensors.torch import load_file

    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.mlp.up_proj.mixlora_adapter.router_AB" in keys
    assert "base_model.model.model.mm_projector.weight" in keys
    back = convert.to_released(tmp_path / "adapter", tmp_path / "back")
    assert back == {"layers": 14, "copied": 0}


@pytest.mark.parametrize(
    ("setting", "value"), [("mix_start_layer", 4), ("ifs_weight", 0.5), ("cond_type", "attr"), ("mix_loraA", False)]
)
def test_refuses_settings_it_cannot_reproduce(tmp_path, setting, value):
    released_checkpoint(tmp_path)
    arguments = reading.load(tmp_path / "cmoa_args.bin")
    setattr(arguments, setting, value)
    torch.save(arguments, tmp_path / "cmoa_args.bin")
    with pytest.raises(ValueError, match=setting):
        convert.to_adapter(tmp_path, tmp_path / "adapter")


def test_refuses_missing_factors_by_layer(tmp_path):
    state = released_checkpoint(tmp_path)
    del state["base_model.model.model.layers.1.mlp.up_proj.lora_B.default.7"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj needs the factors 0 to 11 of lora_B"):
        convert.to_adapter(tmp_path, tmp_path / "adapter")


class Harmful:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "cmoa_args.bin"])
def test_never_unpickles_objects(tmp_path, name, capsys):
    released_checkpoint(tmp_path)
    torch.save({"key": Harmful()}, tmp_path / name)
    with pytest.raises(ValueError, match=name):
        convert.to_adapter(tmp_path, tmp_path / "adapter")
    (tmp_path / name).write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=name):
        convert.to_adapter(tmp_path, tmp_path / "adapter")
    assert "ran" not in capsys.readouterr().out


def test_names_truncated_and_missing_files(tmp_path):
    released_checkpoint(tmp_path, shards=2)
    shard = tmp_path / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"pytorch_model-00002-of-00002\.bin"):
        convert.to_adapter(tmp_path, tmp_path / "adapter")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-00002-of-00002\.bin"):
        convert.to_adapter(tmp_path, tmp_path / "adapter")


def test_command_prints_the_report(tmp_path, capsys):
    released_checkpoint(tmp_path / "released")
    main(["convert", str(tmp_path / "released"), str(tmp_path / "adapter")])
    assert json.loads(capsys.readouterr().out)["layers"] == 14
