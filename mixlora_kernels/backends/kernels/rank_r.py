"""What the passes over an activation have in common: the r rows of a pool that an instance chose, and their columns.

All tokens of a tile have the same r factors. So a pass takes the r chosen rows of the pool, not the pool, and one
column of u or of its gradient for each slot; nothing is permuted.
"""

import triton
import triton.language as tl


@triton.jit
def slot_columns(s, rows, live, R: tl.constexpr, R_PAD: tl.constexpr):
    """The rows of s [N, R]: [BLOCK_N, R_PAD]"""
    slots = tl.arange(0, R_PAD)
    return tl.load(s + rows[:, None] * R + slots[None, :], mask=live[:, None] & (slots < R)[None, :], other=0.0)


@triton.jit
def slot_weights(gate, scale, row, R: tl.constexpr, R_PAD: tl.constexpr):
    """c · gate of an instance, [R_PAD]"""
    slots = tl.arange(0, R_PAD)
    return scale * tl.load(gate + row * R + slots, mask=slots < R, other=0.0).to(tl.float32)


@triton.jit
def chosen_rows(pool, index, row, columns, W, R: tl.constexpr, R_PAD: tl.constexpr):
    """The rows of the pool [E, W] that an instance chose, [R_PAD, BLOCK_W]"""
    slots = tl.arange(0, R_PAD)
    factor = tl.load(index + row * R + slots, mask=slots < R, other=0)
    there = (slots < R)[:, None] & (columns < W)[None, :]
    return tl.load(pool + factor[:, None] * W + columns[None, :], mask=there, other=0.0)
