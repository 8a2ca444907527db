"""What a computation gives a GPU to do: its launches, and the tensors that each reads and writes.

The computation runs on the meta device, at its real size and without memory. Torch's operations are met by a dispatch
mode and tell by their schema which of their tensors they read and write; the package's Triton kernels are launched into
``stand_in``'s driver, and the compiled kernel tells it.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .stand_in import Driver, Kernel

# They allocate, or make another view of what is there.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "set_")
# In place, and what was there before is not read.
OVERWRITING = ("zero_", "fill_", "copy_", "random_", "bernoulli_", "uniform_", "normal_")
# Of their first argument they read no more than they return.
GATHERING = ("index_select", "gather", "embedding", "index")
PACKAGE = "mixlora_kernels"


class Launch(NamedTuple):
    """One launch.

    Attributes:
        read, written: bytes of each tensor that is read or written, by the argument's name; outputs are numbered.
        operations: multiplications and additions of a matrix product.
    """

    name: str
    triton: bool
    read: dict[str, int]
    written: dict[str, int]
    operations: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())


class Recorder(TorchDispatchMode):
    """Notes the launches of what runs under it on the meta device.

    An operation of torch counts as one launch; some, such as a sort, take several on a GPU.

    Args:
        driver: where the package's kernels are launched into; None: they are not expected.

    Attributes:
        launches: in their order. crossings: calls of torch's dispatcher beneath autograd, views included.
    """

    def __init__(self, driver: Driver | None = None):
        super().__init__()
        self.driver = driver
        self.launches: list[Launch] = []
        self.crossings = 0

    def __enter__(self):
        if self.driver is not None:
            self.driver.record = self._record_kernel
        return super().__enter__()

    def __exit__(self, *error):
        if self.driver is not None:
            self.driver.record = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.crossings += 1
        if function.namespace == PACKAGE and self.driver is not None:
            with self:  # the meta device has the outputs' shapes alone; this is what launches
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = function(*args, **kwargs)
        launch = _describe(function, args, kwargs, result)
        if launch is not None:
            self.launches.append(launch)
        return result

    def _record_kernel(self, kernel: Kernel) -> None:
        read, written = (
            {name: size(kernel.arguments[name]) for name, access in kernel.accesses.items() if mark in access}
            for mark in "rw"
        )
        self.launches.append(Launch(kernel.name, True, read, written))


class FusedDropout(TorchFunctionMode):
    """Dropout as one operation, as it is on a GPU; elsewhere torch composes it of three."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout and kwargs["training"] and kwargs["p"]:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        return function(*args, **kwargs)


def record(run: Callable[[], None], driver: Driver | None = None) -> Recorder:
    """The launches of the second of two runs: what is kept from one step to the next is there by then."""
    with FusedDropout():
        run()
        with Recorder(driver) as recorder:
            run()
    return recorder


def size(tensor: Tensor) -> int:
    """The bytes of its elements, each counted once however often it is repeated by a stride of 0."""
    return tensor.itemsize * prod(n for n, stride in zip(tensor.shape, tensor.stride()) if stride)


def _describe(function, args: Sequence, kwargs: dict, result) -> Launch | None:
    """None for what launches nothing."""
    name, schema = function.overloadpacket.__name__, function._schema
    alias = [returned.alias_info for returned in schema.returns]
    is_view = any(info is not None and not info.is_write for info in alias)
    outputs = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
    read, written = {}, {}
    for number, argument in enumerate(schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        tensors = [tensor for tensor in tree_leaves(value) if isinstance(tensor, Tensor)]
        if not tensors:
            continue
        total = sum(map(size, tensors))
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            written[argument.name] = total
        if not (writes and (name in OVERWRITING or argument.kwarg_only)):
            gathers = number == 0 and name in GATHERING
            read[argument.name] = min(total, sum(map(size, outputs))) if gathers else total
    written |= {f"output {n}": size(t) for n, (t, info) in enumerate(zip(outputs, alias)) if info is None}
    if name in FREE or is_view or not any(written.values()):
        return None
    return Launch(name, False, read, written, _operations(function, args, kwargs, result))


def _operations(function, args: Sequence, kwargs: dict, result) -> int:
    name = function.overloadpacket.__name__.rstrip("_")
    count = flop_registry.get(getattr(torch.ops.aten, name, None)) if function.namespace == "aten" else None
    return 0 if count is None else count(*args, **kwargs, out_val=result)
