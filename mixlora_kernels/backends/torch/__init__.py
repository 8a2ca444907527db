"""The stages in plain torch: on any device, in any floating dtype, under any compiler."""

import sys
from functools import partial

from .. import staged
from .decode import FEW, decode
from .expand import expand, expand_backward
from .project import project, project_backward
from .route import condition_table, condition_table_backward, route, route_backward

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
