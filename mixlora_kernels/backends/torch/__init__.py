"""The stages in plain torch: on any device, and the fastest on a CPU."""

from .decode import FEW, decode
from .expand import expand, expand_backward
from .project import project, project_backward
from .route import condition_table, condition_table_backward, route, route_backward

__all__ = [
    "FEW",
    "condition_table",
    "condition_table_backward",
    "decode",
    "expand",
    "expand_backward",
    "project",
    "project_backward",
    "route",
    "route_backward",
]
