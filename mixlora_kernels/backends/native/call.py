"""The compiled kernels and what they are called with. They take addresses, and share torch's OpenMP threads."""

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor

from ...routing import Instances
from ..contract import Factors, Options

WIDEST = 512  # factors in a pool, at most: as in products.h
FLOAT = torch.float32
GATES = {"binary": 0, "straight_through": 1, "weighted": 2}  # as in call.h
COUNTS = ("B", "N", "D", "O", "E", "r", "stride", "gating", "threads", "parts")
ADDRESSES = (
    *("starts", "mask", "lora_a", "lora_b", "router_a", "router_b", "router_ab"),
    *("x", "from", "y", "mean", "logits", "table", "index_a", "index_b", "gate", "probs_a", "probs_b"),
    *("p_ifs", "p_cfs", "q", "chosen"),
    *("dy", "dgate_given", "dprobs_a", "dprobs_b", "dx", "du", "dgate", "dlogits", "dq", "dtable", "dmean"),
    *("part_a", "part_b", "dlora_a", "dlora_b", "drouters", "drouter_ab"),
)
NOTHING = dict.fromkeys((*COUNTS, "scale", *ADDRESSES), 0)
PACKED = Struct(f"@{len(COUNTS)}qd{len(ADDRESSES)}P")


class Call(dict):
    """``call`` of call.h by field, in its order; an address that is not set is NULL.

    Attributes:
        kept: the arrays that were given to ``read``, which have to live as long as the call.
    """

    def __init__(self, N: int, factors: Factors, instances: Instances, options: Options):
        lora_A, lora_B, router_A, router_B, router_AB = factors
        (E, D), threads = lora_A.shape, torch.get_num_threads()
        self.kept = []
        super().__init__(NOTHING)
        self.update(
            B=instances.count, N=N, D=D, O=lora_B.shape[1], E=E, r=options.r, gating=GATES[options.gate],
            threads=threads,
            # A sum over tokens has a part for each thread, but no more than take an eighth of the size of x.
            parts=max(1, min(threads, N // max(128, 8 * E))),
            scale=options.scale,
            starts=self.read(instances.cu_seqlens), mask=self.read(instances.mask),
            lora_a=self.read(lora_A), lora_b=self.read(lora_B), router_a=self.read(router_A),
            router_b=self.read(router_B), router_ab=self.read(router_AB),
        )  # fmt: skip

    def read(self, array: Tensor | None) -> int:
        """The address of an array that is to be float32, or of integers, without gaps; it is copied where it is not."""
        if array is None:
            return 0
        if array.dtype is not FLOAT and array.is_floating_point():
            array = array.float()
        if not array.is_contiguous():
            array = array.contiguous()
        self.kept.append(array)
        return array.data_ptr()

    def read_rows(self, x: Tensor) -> None:
        """Set x [N, D]; there may be gaps between its rows."""
        x = x if x.stride(1) == 1 else x.contiguous()
        self.kept.append(x)
        self["x"], self["stride"] = x.data_ptr(), x.stride(0)

    def run(self, function: str) -> int:
        """Call ``mixlora_forward`` or ``mixlora_backward``; returns what it does."""
        return getattr(load(), function)(PACKED.pack(*self.values()))


def empty(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    """Room that is float32 on the CPU, whatever torch's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu")


@cache
def load() -> ctypes.CDLL:
    """The library.

    Raises:
        FileNotFoundError: it was not compiled when the package was installed.
        OSError: it was compiled from other sources, or does not load.
    """
    paths = (Path(__file__).with_name(f"_kernels{suffix}") for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise FileNotFoundError(
            "which were not compiled when the package was installed: that takes a C compiler with OpenMP"
        )
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "mixlora_call_bytes") or library.mixlora_call_bytes() != PACKED.size:
        raise OSError("which were compiled from an older version's sources: install the package again")
    return library
