"""A layer divided over two processes equals the whole layer. Two CPU processes with gloo; needs no vLLM."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mixlora_kernels as mk
from mixlora_kernels.serving.batch import Batch
from mixlora_kernels.serving.layer import Member, ServedLayer
from mixlora_kernels.serving.op import update_

from .layers import D_IN, MODES, WHOLE, Request, make_parameters, make_served, mode_id

PROCESSES = 2
LENGTHS = (5, 9, 2)


def begin(batch: Batch, computed: int) -> None:
    """A step of three requests: their prompts, or, after that, a token each."""
    lengths = LENGTHS if not computed else (1, 1, 1)
    starts, done = [0, *torch.tensor(lengths).cumsum(0).tolist()], [n * computed for n in LENGTHS]
    batch.begin(*(torch.tensor(array).numpy() for array in (starts, done, LENGTHS)), torch.tensor([3, 5, 7]))


def run(layer: ServedLayer, columns: slice) -> torch.Tensor:
    """What a prefill and a decode step add here."""
    requests = [Request(n, 1, 0, seed) for seed, n in enumerate(LENGTHS)]
    added = []
    for computed, x in enumerate(([r.x[: r.prompt] for r in requests], [r.x[r.prompt :] for r in requests])):
        begin(layer.batch, computed)
        x = torch.cat(x)[:, columns].contiguous()
        y = torch.zeros(len(x), layer.members[-1].stop)
        update_(y, x, layer, layer.batch)
        added.append(y)
    return torch.cat(added)


def row_parallel(rank: int, config, parameters, group: str) -> torch.Tensor:
    """x's D divided: each process adds a part of the update, and the sum over processes is the layer's own."""
    share = D_IN // PROCESSES
    columns = slice(rank * share, (rank + 1) * share)
    added = run(make_served(config, parameters, group=group, columns=columns), columns)
    dist.all_reduce(added)
    return added


def column_parallel(rank: int, config, parameters, _group: str) -> torch.Tensor:
    """The outputs divided: each process has its rows of every member."""
    members, stop = [], 0
    for i, p in enumerate(parameters):
        local = p["lora_B"].shape[1] // PROCESSES
        members.append(Member(f"member{i}", stop, stop + local, slice(rank * local, (rank + 1) * local), WHOLE))
        stop += local
    device = torch.device("cpu")
    layer = ServedLayer(members, parameters, config, Batch(64, device), dtype=torch.float32, device=device)
    layer.reserve(16)
    parts = [torch.empty(0)] * PROCESSES
    dist.all_gather_object(parts, run(layer, WHOLE))
    # Member by member the processes' columns side by side.
    return torch.cat([part[:, m.start : m.stop] for m in members for part in parts], 1)


def work(rank: int, store: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    group = dist.group.WORLD.group_name
    for mode in MODES:
        config = mk.MixLoRAConfig(r=3, num_factors=7, **mode)
        for divided, d_outs in ((row_parallel, (10,)), (column_parallel, (10, 6, 6))):
            added = divided(rank, config, make_parameters(config, d_outs), group)
            if rank == 0:
                results[mode_id(mode), divided.__name__] = added
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(work, (str(tmp_path_factory.mktemp("gloo") / "store"), results), nprocs=PROCESSES)
        return dict(results)


@pytest.mark.slow  # two processes compute all of it before the first
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
@pytest.mark.parametrize("kind, d_outs", [("row_parallel", (10,)), ("column_parallel", (10, 6, 6))])
def test_the_divided_layer_is_the_whole_one(divided, mode, kind, d_outs):
    config = mk.MixLoRAConfig(r=3, num_factors=7, **mode)
    whole = run(make_served(config, make_parameters(config, d_outs)), WHOLE)
    # float32 sums of 12 products of numbers around 1, in another order, times a scaling of 14/3.
    torch.testing.assert_close(divided[mode_id(mode), kind], whole, rtol=1e-5, atol=1e-4)
