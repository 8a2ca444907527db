"""The three products of an activation m [N, W] with the r rows of a pool that were chosen for each instance.

    products    p[t, i] = m[t] · pool[index_i]             u = x · lora_Aᵀ,  v = dy · lora_Bᵀ
    add         m[t] += Σ_i s[t, i] pool[index_i]          y += s · lora_B,  dx += du · lora_A
    collect     dpool[e] = Σ_{t, i: index_i = e} s[t, i] m[t]

There are two ways to compute them. For instances of many tokens, the chosen rows are gathered, [B, K, W], and
multiplied with the instance's tokens in a batched product. Otherwise m is multiplied with the whole pool, and the
chosen columns of the result are selected.

The backward multiplies m with the pools of all G siblings in one product, with K = G · R columns in s. The forward uses
one product for each sibling, K = R: the bits of a product depend on the number of its columns, and each sibling has to
have the bits of a single layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...routing import Instances

TOKENS = 4  # tokens for each chosen row, from which on gathering rows costs less than a product with the whole pool


class ChosenRows(NamedTuple):
    """The rows of G pools that were chosen for each instance."""

    pool: Tensor  # [G * E, W], the pools end to end
    columns: Tensor  # [B, K], rows of ``pool``
    instances: Instances
    gathers: bool

    def rows(self) -> Tensor:
        """[B, K, W]"""
        return self.pool.index_select(0, self.columns.flatten()).view(*self.columns.shape, self.pool.shape[1])

    def batched(self, m: Tensor) -> Tensor:
        """[N, W] -> [B, L, W]"""
        return self.instances.by_token(m)

    def place(self, s: Tensor) -> Tensor:
        """Add s [N, K] up in the columns of the chosen rows: [N, G * E], zero elsewhere. A row may be chosen twice."""
        placed = s.new_zeros(s.shape[0], self.pool.shape[0])
        by_token = self.instances.by_token
        by_token(placed).scatter_add_(-1, self.instances.expand(self.columns), by_token(s))
        return placed


def choose_rows(pools: Sequence[Tensor], index: Tensor, instances: Instances, dtype: torch.dtype) -> ChosenRows:
    """The rows ``index`` [G, B, R] of the pools [E, W] of G siblings, for products in ``dtype``."""
    G, B, R = index.shape
    if G == 1:
        pool, columns = pools[0], index[0]
    else:
        pool = torch.cat(tuple(pools))
        first = torch.arange(0, pool.shape[0], pool.shape[0] // G, device=index.device)
        columns = (index + first[:, None, None]).transpose(0, 1).reshape(B, G * R)
    # On a GPU the product with the whole pool takes no longer. Under torch.compile, the choice would compile two
    # graphs.
    gathers = (
        not torch.compiler.is_compiling()
        and index.device.type == "cpu"
        and instances.length is not None
        and instances.length >= TOKENS * R
    )
    return ChosenRows(pool if pool.dtype is dtype else pool.to(dtype), columns, instances, gathers)


def products(m: Tensor, chosen: ChosenRows) -> Tensor:
    """[N, W] -> [N, K]"""
    if chosen.gathers:
        return torch.bmm(chosen.batched(m), chosen.rows().mT).flatten(0, 1)
    return pick(m @ chosen.pool.T, chosen)


def pick(p: Tensor, chosen: ChosenRows) -> Tensor:
    """Select the chosen columns of products with the whole pool: [N, G * E] -> [N, K]"""
    instances = chosen.instances
    return instances.by_token(p).gather(-1, instances.expand(chosen.columns)).view(len(p), chosen.columns.shape[1])


def add(m: Tensor, s: Tensor, chosen: ChosenRows, in_place: bool = True) -> Tensor:
    """m + s · rows in m's dtype, in place or not: [N, W], [N, K] -> [N, W]"""
    if m.dtype is not s.dtype:  # a base may give its output in another dtype than x's
        return (m + add(s.new_zeros(m.shape), s, chosen)).to(m.dtype)
    if not chosen.gathers:
        return m.addmm_(chosen.place(s), chosen.pool) if in_place else torch.addmm(m, chosen.place(s), chosen.pool)
    if not in_place:
        m = m.clone()  # not torch.baddbmm: its result would be a view here, which a model may not change in place
    chosen.batched(m).baddbmm_(chosen.batched(s), chosen.rows())
    return m


def collect(s: Tensor, m: Tensor, chosen: ChosenRows) -> Tensor:
    """[N, K], [N, W] -> [G * E, W]. A row that no instance chose is exactly zero."""
    if not chosen.gathers:
        return chosen.place(s).T @ m
    parts = torch.bmm(chosen.batched(s).mT, chosen.batched(m)).flatten(0, 1)  # [B * K, W]
    total = torch.zeros(chosen.pool.shape, dtype=torch.promote_types(parts.dtype, torch.float32), device=parts.device)
    return total.index_add_(0, chosen.columns.flatten(), parts.to(total.dtype))  # in a fixed order on a CPU
