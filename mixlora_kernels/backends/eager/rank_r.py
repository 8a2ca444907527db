"""The three products of an activation m [N, W] with the r rows of a pool that each instance chose.

    products    p[t, i] = m[t] · pool[index_i]             u = x · lora_Aᵀ,  v = dy · lora_Bᵀ
    add         m[t] += Σ_i s[t, i] pool[index_i]          y += s · lora_B,  dx += du · lora_A
    collect     dpool[e] = Σ_{t, i: index_i = e} s[t, i] m[t]

There are two ways. Where an instance has tokens enough, its rows are gathered once and meet its tokens in batched
products, [B, K, W]. Elsewhere m meets the whole pool, and an instance's choice picks columns of the result.

In a backward, the pools of G siblings that read one m stand side by side: K = G · R columns in s. In a forward each has
its own products, K = R, because a product's bits depend on the number of its columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...routing import Instances

TOKENS = 4  # for each chosen row, from which on to gather it costs less than the rest of the pool


class Choice(NamedTuple):
    """The rows that each instance chose of G pools."""

    pool: Tensor  # [G * E, W], the pools end to end
    columns: Tensor  # [B, K], rows of ``pool``
    instances: Instances
    gathers: bool

    def rows(self) -> Tensor:
        """[B, K, W]"""
        return self.pool.index_select(0, self.columns.flatten()).view(*self.columns.shape, -1)

    def batched(self, m: Tensor) -> Tensor:
        """[N, W] -> [B, L, W]"""
        return self.instances.by_token(m)

    def place(self, s: Tensor) -> Tensor:
        """s [N, K] in the columns of the whole pool, [N, G * E], zero elsewhere."""
        placed = s.new_zeros(s.shape[0], self.pool.shape[0])
        by_token = self.instances.by_token
        by_token(placed).scatter_(-1, self.instances.expand(self.columns), by_token(s))
        return placed


def choose(pools: Sequence[Tensor], index: Tensor, instances: Instances, dtype: torch.dtype) -> Choice:
    """The choice ``index`` [G, B, R] among the pools [E, W] of G siblings, for products in ``dtype``."""
    G, B, R = index.shape
    if G == 1:
        pool, columns = pools[0], index[0]
    else:
        pool = torch.cat(tuple(pools))
        first = torch.arange(0, pool.shape[0], pool.shape[0] // G, device=index.device)
        columns = (index + first[:, None, None]).transpose(0, 1).reshape(B, G * R)
    # A GPU multiplies with the whole pool in the same time; a graph being compiled would be compiled for either way.
    gathers = (
        not torch.compiler.is_compiling()
        and index.device.type == "cpu"
        and instances.length is not None
        and instances.length >= TOKENS * R
    )
    return Choice(pool if pool.dtype is dtype else pool.to(dtype), columns, instances, gathers)


def products(m: Tensor, choice: Choice) -> Tensor:
    """[N, W] -> [N, K]"""
    if choice.gathers:
        return torch.bmm(choice.batched(m), choice.rows().mT).flatten(0, 1)
    return pick(m @ choice.pool.T, choice)


def pick(p: Tensor, choice: Choice) -> Tensor:
    """The chosen columns of products with the whole pool: [N, G * E] -> [N, K]"""
    instances = choice.instances
    return instances.by_token(p).gather(-1, instances.expand(choice.columns)).view(len(p), choice.columns.shape[1])


def add(m: Tensor, s: Tensor, choice: Choice, in_place: bool = True) -> Tensor:
    """m + s · rows, in place or not: [N, W], [N, K] -> [N, W]"""
    if not choice.gathers:
        return m.addmm_(choice.place(s), choice.pool) if in_place else torch.addmm(m, choice.place(s), choice.pool)
    batch, s, rows = choice.batched(m), choice.batched(s), choice.rows()
    if in_place:
        batch.baddbmm_(s, rows)
        return m
    return torch.baddbmm(batch, s, rows).view(m.shape)


def collect(s: Tensor, m: Tensor, choice: Choice) -> Tensor:
    """[N, K], [N, W] -> [G * E, W]; a row that nobody chose is exactly zero."""
    if not choice.gathers:
        return choice.place(s).T @ m
    parts = torch.bmm(choice.batched(s).mT, choice.batched(m)).flatten(0, 1)  # [B * K, W]
    total = torch.zeros(choice.pool.shape, dtype=torch.promote_types(parts.dtype, torch.float32), device=parts.device)
    return total.index_add_(0, choice.columns.flatten(), parts.to(total.dtype))  # in a fixed order on a CPU
