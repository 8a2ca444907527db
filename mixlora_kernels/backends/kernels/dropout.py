"""Dropout of the input of lora_A from a counter: nothing is stored, the backward draws the forward's mask again.

Philox 4x32 with 7 rounds (Salmon et al. 2011, the fewest that pass BigCrush), keyed by the call's 64-bit seed. The
counter is (column // 8, token), so the mask depends on the place in x and not on the tiles; one draw of 128 bits
serves 8 neighbouring columns with 16 bits each, which keeps the draws cheaper than reading x.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)
PER_DRAW = tl.constexpr(8)


@triton.jit
def keep_tile(seed, rows, first_column, dropped, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of x [rows, first_column + BLOCK_D] are kept; ``dropped`` levels of 65536 are not."""
    draws = (tl.arange(0, BLOCK_D // PER_DRAW) + first_column // PER_DRAW).to(tl.uint32)
    zeros = tl.zeros([BLOCK_N, BLOCK_D // PER_DRAW], tl.uint32)
    low, high = rows.to(tl.uint32), (rows >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed), zeros + draws[None, :], zeros + low[:, None], zeros + high[:, None], zeros, ROUNDS
    )  # [BLOCK_N, BLOCK_D / 8]
    # Column 8 n + 4 h + w takes half h of word w. A join appends an axis: halves, then the word's two bits.
    even, odd = tl.join(halves(w0), halves(w2)), tl.join(halves(w1), halves(w3))
    levels = tl.reshape(tl.join(even, odd), [BLOCK_N, BLOCK_D])
    return levels >= dropped


@triton.jit
def halves(word):
    return tl.join((word & 0xFFFF).to(tl.int32), (word >> 16).to(tl.int32))
