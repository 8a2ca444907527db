"""Siblings: layers of one parent module that read the same x. The first one computes the outputs of all.

A model calls q_proj, k_proj and v_proj one after the other. q_proj computes all three outputs. k_proj and v_proj take
theirs if they are called with the same tensor object, unchanged, in the same modes. Otherwise they compute alone, which
gives the same bits. Outputs that are not taken are dropped at the end of the forward.

Siblings are found by observation: layers of one parent that a forward calls in succession with the same tensor. Layers
with the names in ``USUAL`` are expected to be siblings before the first forward, so that a resumed run has the same
bits as an uninterrupted one. A family that does not fit a forward's calls is dropped after that forward. torch.compile
uses the expected families, and observes none.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapter import frozen_map, has_hooks
from ..backends.base import FrozenLinear
from ..op import mixlora_siblings

if TYPE_CHECKING:
    from .forward_pass import ForwardPass
    from .layer import MixLoRALayer


USUAL = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
)


class Family:
    """Siblings in the order of their calls. A copied layer starts with an empty family."""

    def __init__(self, layers: "Sequence[MixLoRALayer]" = ()):
        self.layers = tuple(layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Family":
        return Family()

    def __reduce__(self) -> tuple[type["Family"], tuple[()]]:
        return Family, ()


def expect_families(layers: "Iterable[MixLoRALayer]") -> None:
    """Make families of the layers that have the same parent and the names in ``USUAL``."""
    by_parent: dict[str, dict[str, MixLoRALayer]] = {}
    for layer in layers:
        by_parent.setdefault(layer.parent, {})[layer.key.rpartition(".")[2]] = layer
    for children in by_parent.values():
        for names in USUAL:
            family = Family([children[name] for name in names if name in children])
            if len({layer.in_features for layer in family.layers}) == 1 < len(family.layers):
                for layer in family.layers:
                    layer.family = family


class Pending(NamedTuple):
    """An output that a sibling computed, and the x, its version and the modes that the layer's call must have."""

    x: Tensor
    version: int
    modes: tuple
    y: Tensor


class Siblings:
    """The siblings' outputs and families in one forward of a decoder."""

    def __init__(self) -> None:
        self._pending: dict[str, Pending] = {}
        self._refused: set[str] = set()  # layers whose call did not fit their pending output
        self._run: list[MixLoRALayer] = []  # the last layers called in succession with one x
        self._x: Callable[[], Tensor | None] = _nothing  # a weak reference to that x
        self._observed: list[list[MixLoRALayer]] = []
        self._groups: dict[str, Sequence[MixLoRALayer]] = {}
        self._over = False  # whether the forward has ended; later calls belong to recomputations

    def compute(self, layer: "MixLoRALayer", name: str, x: Tensor, forward_pass: "ForwardPass") -> Tensor | None:
        """Return the layer's output: the pending one, or the result of computing all siblings. None: the layer has to
        compute alone."""
        pending = self._pending.pop(layer.key, None)
        if pending is not None:
            if pending.x is x and _is_unchanged(x, pending.version) and pending.modes == _modes(layer, name):
                return pending.y
            self._refused.add(layer.key)
        # A recomputation uses the siblings of its forward, because it has to save the same tensors.
        members = self._groups.get(layer.key, ()) if self._over else layer.family.layers
        leads = bool(members) and members[0] is layer
        modes = _modes(layer, name) if leads else ()
        if not leads or not _go_together(members, name, x, modes):
            self._observe(layer, x)
            return None
        self._groups[layer.key] = members
        bases = [frozen_map(member.base_layer, x) for member in members]
        prepared, context = forward_pass.prepare([member.key for member in members], name, layer.configs[name], x)
        adapters = [member.mixlora_adapter._modules[name] for member in members]
        ys, routing = mixlora_siblings(
            prepared,
            [base if prepared is x or isinstance(base, FrozenLinear) else _like(base, prepared) for base in bases],
            [adapter.factors for adapter in adapters],
            layer.configs[name],
            context,
            training=layer.training,
            backend=adapters[0].backend,
        )
        if prepared is not x:
            ys = [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]
        version = x._version
        for g, member in enumerate(members):
            forward_pass.record(member.key, name, routing, g)
            if g:
                self._pending[member.key] = Pending(x, version, modes, ys[g])
        return ys[0]

    def clear(self) -> None:
        """Drop the pending outputs, at the end of a recomputation."""
        self._pending.clear()

    def end(self) -> None:
        """End the forward: drop the pending outputs, and give the layers the families that were observed."""
        idle = self._refused.union(self._pending)
        self._pending.clear()
        for members in self._groups.values():
            if any(member.key in idle for member in members):
                self._hand([member for member in members if member.key not in idle])
                for member in members:
                    if member.key in idle:
                        member.family = Family()
        for run in self._observed:
            self._hand(run)
        self._run, self._x, self._observed, self._over = [], _nothing, [], True
        self._refused.clear()

    @staticmethod
    def _hand(layers: "Sequence[MixLoRALayer]") -> None:
        family = Family(layers if len(layers) > 1 else ())
        for layer in layers:
            layer.family = family

    def _observe(self, layer: "MixLoRALayer", x: Tensor) -> None:
        if self._over or torch.compiler.is_compiling():
            return
        if self._run and self._x() is x and self._run[0].parent == layer.parent and layer not in self._run:
            self._run.append(layer)
            if len(self._run) == 2:
                self._observed.append(self._run)
        else:
            self._run, self._x = [layer], weakref.ref(x)


def _nothing() -> None:
    return None


def _is_unchanged(x: Tensor, version: int) -> bool:
    """Whether x has not been changed in place since it had this version.

    A compiled graph cannot branch on a tensor's version. Under torch.compile a change in place raises torch's error,
    with a traceback to this line. ``torch.compiler.disable`` on the module around the layers avoids it.
    """
    if torch.compiler.is_compiling():
        torch._check(x._version == version)
        return True
    return x._version == version


def _go_together(members: "Sequence[MixLoRALayer]", name: str, x: Tensor, modes: tuple) -> bool:
    """Whether the first of the members, whose modes these are, can compute the outputs of all from x."""
    if type(x) is not Tensor or (not torch.compiler.is_compiling() and x.is_inference()):
        return False  # inference tensors have no version
    return all(_readable(member, name) for member in members) and all(
        _modes(member, name) == modes for member in members[1:]
    )


def _modes(layer: "MixLoRALayer", name: str) -> tuple:
    """The modes and settings that must be equal for all layers of a group, and when a pending output is taken."""
    adapters = layer.mixlora_adapter._modules
    adapter = adapters.get(name)
    return (
        [active for active in layer._active_adapter if active in adapters],
        layer._disable_adapters,
        layer.training,
        id(layer.configs.get(name)),
        getattr(adapter, "_backend", None),
        layer.in_features,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _readable(layer: "MixLoRALayer", name: str) -> bool:
    """Whether a sibling can use the layer's parameters: no FSDP unit or ZeRO-3 gathers them in the layer's own forward
    alone, and the layer has no hooks, which need its own call."""
    adapter = layer.mixlora_adapter._modules.get(name)
    return (
        type(adapter) is layer.adapter_cls
        and not has_hooks(adapter)
        and not has_hooks(layer.base_layer)
        and all(type(p) is nn.Parameter and p.numel() for p in adapter._parameters.values() if p is not None)
    )


def _like(y: Tensor, prepared: Tensor) -> Tensor:
    return y.reshape(*prepared.shape[:-1], y.shape[-1])
