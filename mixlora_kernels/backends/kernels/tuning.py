"""The shipped choices of tiles. Nothing is tried at run time: a new sequence length must not stall a step.

A choice depends on the device's architecture, the layer's width, the padded size of the pool, the element size and
the *bucket* of the number of tokens, so that few variants are compiled. A span of tokens, which is one of few powers of
two, depends on their exact number. The numbers for GPUs follow from counting: a tile's loads in flight should cover
memory latency (some 32 KiB on each of 132 multiprocessors), a pass should start at least two programs for each of them,
and what the tiles of a split pass hand on in partial sums should stay below a tenth of what the pass reads.
benchmarks/compile_report.py shows that they fit registers and shared memory.
"""

from functools import cache
from typing import NamedTuple

import torch

PROGRAMS = 264  # two for each multiprocessor of an H200
LONGEST = 1024  # tokens of a span; twice as many would save 0.4 % of what a pass reads at r = 4 in half precision
BLOCK_E = 32  # factors at a time where a product runs over them: a float32 product keeps all of its length in registers
BUCKETS = (16, 128, 1024, 4096)
SPILLING = ("sm_90", "sm_100")  # whose compiler spills sums to fit one program more, unless it has a budget


class Tile(NamedTuple):
    """One pass over [tokens, width]: tokens and columns of a tile, and how a program walks them.

    Attributes:
        rows, columns: BLOCK_N, and BLOCK_D or BLOCK_O.
        span: tokens (in a backward) or columns (in ``project``) that one program walks over, a multiple of its
            tile; 0 for all columns.
        registers: a thread's budget; 0 leaves it to the compiler, which sometimes spills to fit one program more.
    """

    rows: int
    columns: int
    span: int
    num_warps: int
    num_stages: int
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """What is said to Triton's compiler."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"maxnreg": self.registers} if self.registers else options


def divide(count: int, size: int) -> int:
    """How many of that size. Triton's own function of this kind is made for kernels and takes as long as a launch."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The next one."""
    return 1 << (int(count) - 1).bit_length() if count else 0


@cache
def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, ..., or ``"interpreter"`` for a CPU."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def bucket(tokens: int) -> int:
    """The number of tokens, rounded so that a choice serves many lengths."""
    for limit in BUCKETS:  # a loop, which every torch.compile can trace
        if tokens <= limit:
            return limit
    return 4 * BUCKETS[-1]


def pad(count: int) -> int:
    """E or R padded to what a matrix unit takes, with rows of zeros."""
    return max(16, power_of_2(count))


def rows(tokens: int) -> int:
    """BLOCK_N of every pass."""
    return 16 if bucket(tokens) <= 128 else 64


def siblings(pool: int, draws: bool = False) -> int:
    """How many siblings one program of ``project`` or ``walk`` serves: their sums all stay in registers. So do, in an
    exact walk that ``draws`` dropout, the draws and the operands of its float32 products."""
    return max(1, (32 if draws else 64) // pool)


def project(arch: str, tokens: int, width: int, pool: int, itemsize: int) -> Tile:
    if arch == "interpreter":
        return Tile(rows(tokens), 32, 64, 4, 1)
    columns = max(16, min(128 // itemsize, 2048 // pool))
    # Few tokens leave most of the device idle unless several programs share a row of x; each leaves a plane of u.
    splits = max(1, min(PROGRAMS * rows(tokens) // bucket(tokens), 16))
    span = 0 if splits == 1 else columns * max(4, divide(divide(width, splits), columns))
    if arch.startswith("gfx"):
        return Tile(rows(tokens), columns, span, 4, 2)
    if itemsize == 4:  # exact products, whose operands stay in registers
        return Tile(rows(tokens), columns, span, 8 if 16 < pool < 128 else 4, 3)
    return Tile(rows(tokens), columns, span, 4, 4)


def pool(arch: str, pool: int) -> Tile:
    """``columns`` of what the routers read to a program; T's programs take ``rows`` factors of B and walk a span of the
    width in blocks of ``span``."""
    if arch == "interpreter":
        return Tile(16, 32, 32, 4, 1)
    return Tile(min(pool, 32), max(32, min(128, 4096 // pool)), 32, 4, 2)


def table_span(width: int, blocks: int, block: int) -> int:
    """How much of the width a program of T takes, where a sibling has ``blocks`` of them for every span."""
    splits = max(1, min(8, 64 // blocks))
    return block * divide(divide(width, splits), block)


def is_long(slots: int, itemsize: int) -> bool:
    """Whether an exact float32 product over the slots is too long for the registers, in which its operands are kept."""
    return itemsize == 4 and slots > 16


def add(arch: str, tokens: int, slots: int, itemsize: int) -> Tile:
    if arch == "interpreter":
        return Tile(rows(tokens), 32, 0, 4, 1)
    return Tile(16 if is_long(slots, itemsize) else rows(tokens), 256 // itemsize, 0, 8, 1)


def collect(arch: str, tokens: int, width: int, slots: int, itemsize: int) -> Tile:
    """``width``: of all siblings together. Each piece of it leaves a plane [N, R] and each chunk of tokens sums [R, O]:
    neither may be small.

    Together they stay below a quarter of dy for up to 16 slots, and below dy for up to 64 (``hands_on``).
    """
    if arch == "interpreter":
        return Tile(rows(tokens), 32, 2 * rows(tokens), 4, 1)
    columns, gfx = 512 // itemsize, arch.startswith("gfx")
    span = rows(tokens)
    while hands_on(slots, itemsize, columns, span) > (1 / 4 if slots <= 16 else 1):
        span *= 2
    span = lengthen(span, tokens, divide(width, columns))
    long = is_long(slots, itemsize)
    block = 16 if long else rows(tokens)
    if gfx:
        return Tile(block, columns, span, 4 if slots > 16 else 8, 2)
    return Tile(block, columns, span, 8, 2, 255) if long else Tile(block, columns, span, 8, 3)


def hands_on(slots: int, itemsize: int, columns: int, span: int) -> float:
    """What ``collect`` writes and reads again in float32, relative to dy, where an instance fills its chunks."""
    return 4 * slots / itemsize * (1 / columns + 1 / span)


def lengthen(span: int, tokens: int, pieces: int) -> int:
    """Double a program's span of tokens, up to ``LONGEST``, as long as the pieces of the width leave ``PROGRAMS``."""
    while span < LONGEST and pieces * tokens >= 2 * PROGRAMS * span:
        span *= 2
    return span


def walk(arch: str, tokens: int, width: int, slots: int, itemsize: int, drops: bool) -> Tile:
    if arch == "interpreter":
        return Tile(rows(tokens), 32, 2 * rows(tokens), 4, 1)
    columns, block, gfx = 128 // itemsize, rows(tokens), arch.startswith("gfx")
    if drops and is_long(slots, itemsize) and not gfx:
        columns //= 2
    span = lengthen(block, tokens, divide(width, columns))
    # The draws of dropout take the registers that a larger tile, or a second one on its way, would need. On sm_80 the
    # larger tile spills without them, too.
    if drops:
        block = min(block, 16 if is_long(slots, itemsize) or arch == "sm_100" else 32)
        return Tile(block, columns, span, 4 if gfx else 8, 1, 0 if gfx else 255)
    return Tile(min(block, 32) if arch.startswith("sm_8") else block, columns, span, 8, 2)


def gather(arch: str, pool: int) -> Tile:
    """For the sums over partial sums: rows at a time, and columns."""
    tile = routers(arch, pool)
    if arch in SPILLING:
        return tile._replace(num_stages=1, registers=96 if pool < 64 else 128)
    return tile


def routers(arch: str, pool: int) -> Tile:
    """For the routers' gradients, columns alone."""
    if arch == "interpreter":
        return Tile(16, 32, 0, 4, 1)
    registers = 128 if arch in SPILLING and pool > 64 else 0
    return Tile(32, max(16, min(64, 1024 // pool)), 0, 4 if pool < 64 else 8, 2, registers)


def decode(arch: str, slots: int) -> Tile:
    """The span is in columns of x, all at once for each slot."""
    if arch == "interpreter":
        return Tile(1, 32, 64, 4, 1)
    return Tile(1, 128, max(64, 2048 // power_of_2(slots)), 4, 2)
