"""The stages as Triton kernels, registered as ``torch.ops.mixlora_kernels.*``. Importing this imports Triton.

T of the conditional router is a product of parameters alone; it stays torch's.
"""

import sys
from functools import partial

from .. import staged
from ..torch.route import condition_table, condition_table_backward
from .decode import FEW, decode
from .expand import expand, expand_backward
from .project import project, project_backward
from .route import route, route_backward

forward = partial(staged.forward, sys.modules[__name__])
backward = partial(staged.backward, sys.modules[__name__])

__all__ = [
    "FEW",
    "backward",
    "condition_table",
    "condition_table_backward",
    "decode",
    "expand",
    "expand_backward",
    "forward",
    "project",
    "project_backward",
    "route",
    "route_backward",
]
