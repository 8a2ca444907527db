"""Two processes (gloo) against one: the same gradients, the same saved adapter."""

import copy
import os
import socket
import traceback
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load

from .models import adapt, build, gradients, pad, prompts, trained

pytestmark = pytest.mark.slow

WORLD = 2
# In float32: the two halves' gradients are averaged in another order than one process adds them up.
TOLERANCE = 1e-6


def batch() -> dict[str, torch.Tensor]:
    """Four instances; two for each process, which must not need the same padding."""
    ids, mask = pad(prompts(4, lengths=(9, 6, 5, 7)), "right")
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def half(rank: int) -> dict[str, torch.Tensor]:
    return {name: value[2 * rank : 2 * rank + 2] for name, value in batch().items()}


def loss_of(model, part: dict) -> torch.Tensor:
    """A mean over all four instances, when averaged over the processes."""
    logits = model(**{name: value for name, value in part.items() if name != "labels"}, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), part["labels"][:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    return losses.sum() / 10


def model_for(settings: dict, dtype=torch.float32):
    return adapt(build().to(dtype), alpha=4, **settings).train()


def _entry(rank: int, port: int, jobs: dict, folder: str) -> None:
    """Run the jobs in turn and leave a file for each: empty, or how it failed; after a failure none is run."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(WORLD))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true", DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    for name, (work, *arguments) in jobs.items():
        result = Path(folder, f"{name}.{rank}")
        try:
            work(rank, *arguments)
        except Exception:  # not swallowed: told to the test that waits for the file, and raised again
            result.write_text(traceback.format_exc())
            raise
        result.write_text("")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """One pair of processes for all jobs: most of their time goes into imports."""
    folder = tmp_path_factory.mktemp("jobs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = {name: job for name, job in JOBS.items() if name not in LEFT_OUT}
    try:
        mp.spawn(_entry, args=(port, jobs, str(folder)), nprocs=WORLD)
    except mp.ProcessRaisedException:
        assert any(file.read_text() for file in folder.iterdir())  # told by the job's own test
    return folder


def expected_gradients(settings: dict) -> dict[str, torch.Tensor]:
    model = model_for(settings)
    for rank in range(WORLD):
        (loss_of(model, half(rank)) / WORLD).backward()
    return {name: parameter.grad for name, parameter in trained(model).items()}


def compare(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    error = sum((found[name] - value).double().square().sum() for name, value in expected.items()).sqrt()
    size = sum(value.double().square().sum() for value in expected.values()).sqrt()
    assert error < TOLERANCE * size, f"{error / size}"


def _ddp(rank: int, settings: dict, checkpointing: bool = False) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = model_for(settings)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped = DistributedDataParallel(model)  # complains of a parameter without a gradient at the next forward
    for _ in range(2):
        model.zero_grad()
        loss_of(wrapped, half(rank)).backward()
    found = gradients(model)
    if settings.get("routing") != "random":
        compare(found, expected_gradients(settings))


def _fsdp2(rank: int, checkpointing: bool) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = model_for({})
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss_of(model, half(rank)).backward()
    found = {name: parameter.grad.full_tensor() for name, parameter in trained(model).items()}
    compare(found, expected_gradients({}))
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        check_saved(model, weights, trained(model_for({})))


def check_saved(model, weights: dict, expected: dict) -> None:
    """What is saved of a sharded model, from its gathered weights, holds all of the adapter and no more."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, state_dict=weights)
        saved = load(Path(folder, "adapter_model.safetensors").read_bytes())
    compare(saved, {name.replace(".default.", "."): value.detach() for name, value in expected.items()})


def _fsdp1(rank: int, dtype: torch.dtype) -> None:
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = model_for({}, dtype)
    reference = copy.deepcopy(model)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=fsdp_auto_wrap_policy(model), use_orig_params=True, device_id=torch.device("cpu")
    )
    units = [module for module in wrapped.modules() if isinstance(module, FullyShardedDataParallel)]
    assert len(units) == 1 + 2 + 14  # the model, each layer, each adapter
    loss_of(wrapped, half(rank)).backward()
    for part in range(WORLD):
        (loss_of(reference, half(part)) / WORLD).backward()
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        found = {
            name.replace("_fsdp_wrapped_module.", ""): parameter.grad.clone()
            for name, parameter in wrapped.named_parameters()
            if parameter.requires_grad
        }
    expected = {name: parameter.grad for name, parameter in trained(reference).items()}
    if dtype == torch.float32:
        compare(found, expected)
    else:
        assert found.keys() == expected.keys()
        assert all(torch.isfinite(value).all() for value in found.values())


def _accelerate(rank: int, plugin: str) -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    options = {}
    if plugin == "fsdp2":
        wrap = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2, **wrap)
    accelerator = Accelerator(cpu=True, **options)
    model = model_for({})
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(loss_of(wrapped, half(rank)))
    optimizer.step()
    expected = expected_gradients({})
    found = {}
    for name, parameter in trained(accelerator.unwrap_model(wrapped)).items():
        value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[name] = (before[name] - value.detach()) / 0.1
    # The step is read off the weights, whose rounding (2**-24 of each) the division by 0.1 enlarges.
    error = max((found[name] - value).abs().max().item() for name, value in expected.items())
    assert error < 1e-5, error
    AcceleratorState._reset_state(True)


def _zero(rank: int, stage: int, checkpointing: bool) -> None:
    """DeepSpeed: the gradients of each of three steps, the weights after them, and what is saved."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    model, reference = model_for({}), model_for({})
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.SGD(trained(reference).values(), lr=0.1)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained(model).values(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": len(half(rank)["input_ids"]),
            # 0: of these small parameters, too, a process keeps its part only.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    for _ in range(3):
        for part in range(WORLD):
            (loss_of(reference, half(part)) / WORLD).backward()
        engine.backward(loss_of(engine, half(rank)))
        found = {name: safe_get_full_grad(parameter) for name, parameter in trained(model).items()}
        compare(found, {name: parameter.grad for name, parameter in trained(reference).items()})
        optimizer.step()
        optimizer.zero_grad()
        engine.step()
    found = {name: safe_get_full_fp32_param(parameter) for name, parameter in trained(model).items()}
    compare(found, trained(reference))
    if stage == 3:
        sharded = sum(parameter.numel() for parameter in trained(model).values())
        assert sharded < sum(value.numel() for value in found.values())  # nothing would be shown otherwise
        weights = engine._zero3_consolidated_16bit_state_dict()  # as Accelerate gathers them
    else:
        weights = model.state_dict()
    if rank == 0:
        check_saved(model, weights, trained(reference))
    engine.destroy()


JOBS = {
    "ddp": (_ddp, {}),
    "ddp-checkpointed": (_ddp, {}, True),
    "ddp-binary": (_ddp, {"gate": "binary"}),
    "ddp-random": (_ddp, {"routing": "random"}),
    "fsdp2": (_fsdp2, False),
    "fsdp2-checkpointed": (_fsdp2, True),
    "fsdp1-pefts-policy": (_fsdp1, torch.float32),
    "fsdp1-pefts-policy-bfloat16-base": (_fsdp1, torch.bfloat16),
    "accelerate-ddp": (_accelerate, "ddp"),
    "accelerate-fsdp2": (_accelerate, "fsdp2"),
    "zero2": (_zero, 2, False),
    "zero2-checkpointed": (_zero, 2, True),
    "zero3": (_zero, 3, False),
    "zero3-checkpointed": (_zero, 3, True),
}
LEFT_OUT = set() if find_spec("deepspeed") else {name for name, (work, *_) in JOBS.items() if work is _zero}


@pytest.mark.parametrize("job", JOBS)
def test_two_processes(results, job):
    if job in LEFT_OUT:
        pytest.skip("DeepSpeed is not installed: ZeRO was not run")
    for rank in range(WORLD):
        result = results / f"{job}.{rank}"
        assert result.exists(), f"not run, because an earlier job failed: {sorted(os.listdir(results))}"
        assert not result.read_text(), result.read_text()
