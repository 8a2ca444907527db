"""ServedLayer: an adapter's parameters and state for one fused layer, and the wrapper of the layer's linear method."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import MixLoRAConfig
from .batch import Batch
from .op import serve  # noqa: F401  (defines the operation)
from .routing import Choice, router_matrix, table_of
from .rows import rows_of
from .state import state_of


class Member(NamedTuple):
    """This process's part of one adapted layer in a fused layer.

    Attributes:
        path: the layer's name in the trained model.
        start, stop: its columns in this process's output of the fused layer.
        rows: this process's part of O in the layer's lora_B [E, O].
        columns: this process's part of D.
    """

    path: str
    start: int
    stop: int
    rows: slice
    columns: slice


class ServedLayer(nn.Module):
    """The parameters of G adapted layers that read one x, and their requests' state.

    Args:
        members: the adapted layers in the fused layer.
        parameters: each member's whole tensors by name (``lora_A`` ...), float32.
        config: the adapter's configuration.
        batch: the model's batch.
        dtype, device: of the served layer's activations.
        group: the name of the process group that x's D is divided over; None: x is whole.
        backend: ``"triton"`` or ``"torch"``; None: ``"triton"`` on a GPU, ``"torch"`` elsewhere.
    """

    lora_A: Tensor

    def __init__(
        self, members: Sequence[Member], parameters: Sequence[dict[str, Tensor]], config: MixLoRAConfig, batch: Batch,
        *, dtype: torch.dtype, device: torch.device, group: str | None = None, backend: str | None = None,
    ):  # fmt: skip
        super().__init__()
        self.members, self.config, self.batch, self.group = list(members), config, batch, group
        parts = [p["lora_A"][:, m.columns] for p, m in zip(parameters, members)]
        self.register_buffer("lora_A", torch.cat(parts).to(device, dtype), persistent=False)  # [G * E, D]
        # T is computed from all of D in each process. Only the logits are summed over the processes.
        self.tables: list[Tensor | None] = []
        self.routers: list[Tensor] = []
        self.lora_B: list[Tensor] = []
        for p, member in zip(parameters, members):
            table = table_of(p["lora_A"], p.get("router_AB"), config)
            self.tables.append(None if table is None else table.to(device))
            routers = router_matrix(p["router_A"], p.get("router_B"))
            self.routers.append(routers[:, member.columns].contiguous().to(device))  # [R, D] float32
            self.lora_B.append(p["lora_B"][:, member.rows].contiguous().to(device, dtype))  # [E, O]
        self.state = state_of(len(self.members), config, device)
        self.rows = rows_of(len(self.members), config, self.lora_A, backend)

    @property
    def kept(self) -> list:
        """The objects that keep the requests' choices."""
        return [self.state] if self.rows is None else [self.state, self.rows]

    def reserve(self, blocks: int) -> None:
        """Allocate state for this number of KV blocks. Earlier state is dropped."""
        for kept in self.kept:
            kept.reserve(blocks)

    def write(self, blocks: Tensor, choice: Choice) -> None:
        """Store the choices [P, G, R] of P requests at their first KV blocks, [P] int64."""
        for kept in self.kept:
            kept.write(blocks, choice)

    def extra_repr(self) -> str:
        return ", ".join(member.path for member in self.members)


class AdaptedMethod:
    """vLLM's method of a linear layer, which also adds the adapter's update to the layer's output.

    In a row-parallel layer it runs before the sum over processes, so that the update is summed too.
    """

    def __init__(self, inner: Any, name: str):
        self.inner, self.name = inner, name

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "inner":  # not set yet while a copy is being made
            raise AttributeError(attribute)
        return getattr(self.inner, attribute)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.inner.apply(layer, x, bias)
        torch.ops.mixlora.serve(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), self.name)
        return y
