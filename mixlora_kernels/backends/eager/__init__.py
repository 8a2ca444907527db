"""The stages in plain torch, for any device and any floating dtype, and for torch.compile."""

from collections.abc import Sequence

from torch import Tensor

from ...routing import Routing
from .. import node
from ..base import Group
from .decode import decode
from .expand import expand, expand_backward
from .project import project, project_backward


class Eager:
    """The backend called ``"torch"``."""

    name = "torch"
    writes_first = False

    def apply(self, group: Group) -> tuple[Sequence[Tensor], Routing]:
        """``Backend.apply``."""
        return node.apply(self, group)

    def decodes(self, group: Group) -> bool:
        """``Backend.decodes``: always."""
        return True

    decode = staticmethod(decode)
    project = staticmethod(project)
    expand = staticmethod(expand)
    expand_backward = staticmethod(expand_backward)
    project_backward = staticmethod(project_backward)


EAGER = Eager()
