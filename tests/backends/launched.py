"""The stages up to the driver's launch, with Triton's own launcher: ``python -m tests.backends.launched LIBCUDA``.

LIBCUDA is libcuda.c, compiled. Every parameter of every launch is compared with the argument that it stands for.
"""

import ctypes
import struct
import sys
from collections.abc import Iterator

import torch
from launching.stand_in import install
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

from mixlora_kernels.backends.kernels import KERNELS

from .groups import make_group, run_stages

DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32,
    "i32": torch.int32, "i64": torch.int64, "u1": torch.bool, "i1": torch.bool,
}  # fmt: skip
FORMS = {"i32": "<i", "i64": "<q", "fp32": "<f"}  # of numbers
SIZES = {"B": 2, "L": 40, "D": 64, "widths": (48, 80, 16)}
GROUPS = [
    {},
    {"widths": (48,), "dtype": torch.float32, "packed": True},
    {"conditioning": "tied", "gate": "normalized", "masked": True, "dropout": 0.25},
    {"conditioning": "published", "gate": "weighted", "packed": True, "masked": True, "dtype": torch.float16},
    {"conditioning": "none", "gate": "binary", "task": True, "widths": (48, 80)},
    {"given": True, "dropout": 0.25},
]


class Library:
    """libcuda.c: what it noted of the last launch."""

    def __init__(self, path: str):
        library = ctypes.CDLL(path)
        self.noted = (ctypes.c_ulonglong * 512).in_dll(library, "noted")
        self.grid = (ctypes.c_uint * 3).in_dll(library, "grid")
        self.parameters, self.launches = (ctypes.c_int.in_dll(library, name) for name in ("parameters", "launches"))


def flatten(kind, value) -> Iterator[tuple[str, object]]:
    """The kernel's parameters, each with its type in Triton's words: the members of a tuple, and no constants."""
    if isinstance(kind, tuple):
        assert isinstance(value, tuple) and len(kind) == len(value)
        for pair in zip(kind, value):
            yield from flatten(*pair)
    elif kind != "constexpr":
        yield kind, value


def check_parameter(kind: str, value, noted: int) -> None:
    if kind.startswith("*"):
        assert noted == value.data_ptr() and DTYPES[kind[1:]] == value.dtype, (kind, value.dtype)
    else:
        expected = struct.pack(FORMS[kind], value)
        assert noted.to_bytes(8, "little")[: len(expected)] == expected, (kind, value)


def main() -> None:
    library, names = Library(sys.argv[1]), []
    driver = install()
    driver.utils = CudaUtils()

    def make_launcher(source, metadata):
        launcher = CudaLauncher(source, metadata)
        kinds = [source.signature[name] for name in source.fn.arg_names]

        def launch(x, y, z, *rest):
            arguments = rest[-len(kinds) :]
            parameters = [pair for both in zip(kinds, arguments, strict=True) for pair in flatten(*both)]
            assert len(parameters) <= len(library.noted)
            library.parameters.value, before = len(parameters), library.launches.value
            launcher(x, y, z, *rest)
            assert library.launches.value == before + 1 and tuple(library.grid) == (x, y, z)
            for (kind, value), noted in zip(parameters, library.noted):
                check_parameter(kind, value, noted)
            names.append(metadata.name)

        return launch

    driver.launcher_cls = make_launcher
    for settings in GROUPS:
        group = make_group("cpu", **{"dtype": torch.bfloat16, **SIZES, **settings})
        for _ in range(2):  # through Triton, and by what the first launch found
            run_stages(KERNELS, group)
            if group.given is not None:
                KERNELS.decode(group._replace(seeds=None))
    print(len(names), *sorted(set(names)))


if __name__ == "__main__":
    main()
