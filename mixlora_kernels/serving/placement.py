"""Find an adapter's layers in the served model, which has other names and fuses layers that read the same input."""

from collections.abc import Mapping

from torch import Tensor, nn
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from .layer import Member

ALL = slice(None)


def place(
    model: nn.Module, layers: Mapping[str, Mapping[str, Tensor]], decoder_layers: set[str]
) -> dict[str, list[Member]]:
    """Find the served layer of each adapted layer.

    Args:
        model: the served model.
        layers: the parameters of each adapted layer, by its path in the trained model.
        decoder_layers: the paths of the served decoder's layers. Only their inputs are the requests' tokens.

    Returns:
        The members of each fused layer, by its name in the served model.

    Raises:
        ValueError: the adapter is for another model: a layer is missing, or has other sizes. The message lists them.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, LinearBase)}
    found: dict[str, list[Member]] = {}
    problems = []
    for path, parameters in layers.items():
        name, index = find(path, model, modules)
        if name is None:
            problems.append(f"{path}: the served model has no such linear layer")
            continue
        if not any(name.startswith(f"{layer}.") for layer in decoder_layers):
            problems.append(f"{path}: it is outside of the text decoder, where there are no requests to route")
            continue
        module = modules[name]
        member, d_out = member_of(module, index, path)
        sizes = parameters["lora_A"].shape[1], parameters["lora_B"].shape[1]
        if sizes != (module.input_size, d_out):
            problems.append(
                f"{path}: the adapter maps {sizes[0]} to {sizes[1]}, the model {module.input_size} to {d_out}"
            )
            continue
        found.setdefault(name, []).append(member)
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"the adapter is for another model than {type(model).__name__}: {shown}")
    return {name: sorted(members, key=lambda member: member.start) for name, members in found.items()}


def find(path: str, model: nn.Module, modules: Mapping[str, LinearBase]) -> tuple[str | None, int | None]:
    """The name of the served layer for a path, and the index of the path's part in it; (None, None) if there is
    none."""
    parent, _, leaf = path.rpartition(".")
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    # Only the parent's name is mapped: for the whole name, the mapper would not say which part of a fused layer it is.
    mapped = f"{parent}." if mapper is None else mapper.map_name(f"{parent}.")
    if mapped is None:
        return None, None
    if mapped + leaf in modules:
        return mapped + leaf, None
    for fused, parts in getattr(model, "packed_modules_mapping", {}).items():
        if leaf in parts and mapped + fused in modules:
            return mapped + fused, parts.index(leaf)
    return None, None


def member_of(module: LinearBase, index: int | None, path: str) -> tuple[Member, int]:
    """One of the layers fused in a served layer, and its d_out over all processes.

    Raises:
        ValueError: the kind of the served layer is unknown.
    """
    rank, size = module.tp_rank, module.tp_size
    if isinstance(module, RowParallelLinear):
        width = module.input_size // size
        columns = slice(rank * width, (rank + 1) * width)
        return Member(path, 0, module.output_size, ALL, columns), module.output_size
    if isinstance(module, QKVParallelLinear) and index is not None:
        head = (module.head_size, module.head_size, module.v_head_size)[index]
        heads = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
        total = (module.total_num_heads, module.total_num_kv_heads, module.total_num_kv_heads)[index] * head
        heads_before = (0, module.num_heads, module.num_heads + module.num_kv_heads)[index] * module.head_size
        local = heads[index] * head
        shard = rank if index == 0 else rank // module.num_kv_head_replicas
        return Member(path, heads_before, heads_before + local, slice(shard * local, (shard + 1) * local), ALL), total
    if isinstance(module, (ColumnParallelLinear, ReplicatedLinear)):
        sizes = getattr(module, "output_sizes", None) or [module.output_size]
        if index is None:
            index, sizes = 0, [sum(sizes)]
        if isinstance(module, ReplicatedLinear):
            rank, size = 0, 1
        start, local = sum(sizes[:index]) // size, sizes[index] // size
        return Member(path, start, start + local, slice(rank * local, (rank + 1) * local), ALL), sizes[index]
    raise ValueError(f"{path}: {type(module).__name__} is a kind of layer that MixLoRA cannot be served on")


def group_of(module: LinearBase) -> str | None:
    """The name of the process group that a layer's input is divided over; None if it is not divided."""
    divided = isinstance(module, RowParallelLinear) and module.tp_size > 1
    return get_tp_group().device_group.group_name if divided else None
