"""project: u = drop(x) · lora_Aᵀ and the routers' logits, and back.

The logits are the routers' product with the mean of an instance's pooled tokens. Here the mean comes first: to
read x once more costs less than 2E more columns of the product, and it keeps float32 where x has less.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...routing import Instances, can_look
from .dropout import project_dropped, project_dropped_backward

BLOCK = 128  # tokens copied at a time where x cannot be summed as it lies


def project(x: Tensor, lora_A: Tensor, routers: Tensor | None, instances: Instances, seed: Tensor | None, p: float):
    """The product of x [N, d_in], dropped where there is a seed, with the whole pool [E, d_in].

    Returns u [N, E] before the scale 1 / (1 - p), and, where ``routers`` [2E, d_in] is given, the logits [B, 2E]
    and the means [B, d_in] in the routers' dtype; else None for both.
    """
    lora_A = lora_A.to(x.dtype)
    u = F.linear(x, lora_A) if seed is None else project_dropped(x, lora_A, seed, p)
    if routers is None:
        return u, None, None
    pooled = mean(x, instances, routers.dtype)
    return u, pooled @ routers.T, pooled


def project_backward(
    dx, x, du, lora_A, index_a, dlogits, routers, pooled, instances: Instances, seed, p, need_x, need_A
):
    """The gradients of x [N, d_in], of lora_A [E, d_in] and of the routers [2E, d_in], None where there is none.

    Args:
        dx: what x's gradient is added to in place, or None.
        dlogits: gradient of the logits [B, 2E], or None; then ``routers`` and ``pooled`` do not matter.
    """
    dlora_A = drouters = None
    lora_A = lora_A.to(du.dtype)
    if seed is not None:
        dx = torch.zeros_like(x) if need_x and dx is None else dx
        dlora_A = project_dropped_backward(dx if need_x else None, x, du, lora_A, seed, p)
    else:
        if need_x:
            dx = du @ lora_A if dx is None else dx.addmm_(du, lora_A)
        if need_A:
            dlora_A = du.T @ x
    if dlogits is not None:
        drouters = dlogits.T @ pooled
        if need_x:
            _mean_backward(dx, dlogits @ routers, instances)
    return dx, dlora_A, drouters


def _mean_backward(dx: Tensor, dpooled: Tensor, instances: Instances) -> None:
    """Give every pooled token its share of the gradient of its instance's mean, [B, d_in]: added to dx in place."""
    dpooled = (dpooled * instances.share(dpooled.dtype)).to(dx.dtype)
    if instances.mask is None and instances.length is not None:
        instances.by_token(dx).add_(dpooled.unsqueeze(1))
    else:  # as a product with the instances' indicators, which takes no copy of dpooled for each token
        tokens = instances.index(dx.device)
        member = tokens[:, None] == torch.arange(instances.count, device=dx.device)  # [N, B]
        if instances.mask is not None:
            member &= instances.mask[:, None]
        dx.addmm_(member.to(dx.dtype), dpooled)


def mean(x: Tensor, instances: Instances, dtype: torch.dtype) -> Tensor:
    """The mean of each instance's pooled tokens: x [N, d_in] -> [B, d_in] in ``dtype``."""
    N, mask, look = x.shape[0], instances.mask, can_look(x)
    if look and mask is not None and mask.all():
        mask = None
    # Summed as it lies where that makes no copy of x: the CPU's sum first converts the whole of its input.
    if mask is None and instances.length is not None and (x.dtype == dtype or not look):
        return instances.by_token(x).sum(dim=1, dtype=dtype) * instances.share(dtype)
    block = BLOCK if look else max(N, 1)  # a compiled graph makes no copy and wants no loop
    total = x.new_zeros(instances.count, x.shape[1], dtype=dtype)
    instance = instances.index(x.device)
    for first in range(0, N, block):
        rows = slice(first, first + block)
        part = x[rows].to(dtype)
        if mask is not None and not (look and mask[rows].all()):
            # Filled, not multiplied by 0: what stands in the padding may be infinite.
            part = part.masked_fill(~mask[rows, None], 0)
        total.index_add_(0, instance[rows], part)
    return total * instances.share(dtype)
