"""The stages in plain torch: on any device, and the fastest on a CPU."""

from .expand import expand, expand_backward
from .project import project, project_backward
from .route import condition_table, condition_table_backward, route, route_backward

FEW = 0  # there is no shorter way for few tokens

__all__ = [
    "FEW",
    "condition_table",
    "condition_table_backward",
    "expand",
    "expand_backward",
    "project",
    "project_backward",
    "route",
    "route_backward",
]
