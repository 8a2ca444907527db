"""The paper's equations as a backend: it calls ``mixlora_kernels.reference`` for each instance. Autograd computes the
gradients."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dropout import keep_scale
from ..frozen import frozen_product
from ..routing import Instances, Routing, packed
from .base import FrozenLinear, Group
from .eager.dropout import keep_mask


class Reference:
    """The backend called ``"reference"``."""

    name = "reference"

    def apply(self, group: Group) -> tuple[Sequence[Tensor], Routing]:
        """``Backend.apply``."""
        if group.instances.count == 0:
            ys, routing = self.apply(_with_one_instance(group))
            return [y[:0] for y in ys], Routing(*(t[:, :0] for t in routing))
        pairs = [self._apply_one(group, g) for g in range(len(group.factors))]
        ys, routings = zip(*pairs)
        if group.given is not None:
            return ys, group.given
        return ys, Routing(*map(torch.stack, zip(*routings)))

    def decodes(self, group: Group) -> bool:
        """``Backend.decodes``: never."""
        return False

    def decode(self, group: Group) -> Sequence[Tensor]:
        """``Backend.decode``."""
        return self.apply(group)[0]

    def _apply_one(self, group: Group, g: int) -> tuple[Tensor, Routing | None]:
        x, instances, options, base, given = group.x, group.instances, group.options, group.bases[g], group.given
        frozen = frozen_product(x, *base) if isinstance(base, FrozenLinear) else base
        dropped = x
        if group.seeds is not None:
            dropped = x * keep_mask(group.seeds[g : g + 1], x, options.p) * keep_scale(options.p)
        scaling = options.scale / (keep_scale(options.p) if group.seeds is not None else 1)
        conditioning = "tied" if options.tied else options.conditioning or "none"
        ys, routings = [], []
        for b, rows in enumerate(self._rows(group)):
            y, routing = reference.mixlora(
                x[rows], frozen[rows], *group.factors[g], r=options.r, scaling=scaling, conditioning=conditioning,
                gate=options.gate, mask=None if instances.mask is None else instances.mask[rows],
                task=None if group.read is None else group.read[b : b + 1],
                chosen=None if given is None else (given.index_a[g, b], given.index_b[g, b], given.gate[g, b]),
                dropped=dropped[rows],
            )  # fmt: skip
            ys.append(y)
            routings.append(routing)
        return torch.cat(ys), None if given is not None else Routing(*map(torch.stack, zip(*routings)))

    @staticmethod
    def _rows(group: Group) -> list[slice]:
        instances = group.instances
        if instances.length is None:
            starts = packed(instances.cu_seqlens).tolist()
            return [slice(start, end) for start, end in pairwise(starts)]
        return [slice(b * instances.length, (b + 1) * instances.length) for b in range(instances.count)]


def _with_one_instance(group: Group) -> Group:
    """For a group without instances: the same with one, of a token of zeros. What it gives is cut off again, and leaves
    the shapes, the dtypes and the autograd graph."""

    def one(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0, 0, 1))

    return group._replace(
        x=one(group.x),
        bases=[base if isinstance(base, FrozenLinear) else one(base) for base in group.bases],
        read=None if group.read is None else one(group.read),
        given=None if group.given is None else Routing(*map(one, group.given)),
        instances=Instances(1, 1),
    )


REFERENCE = Reference()
