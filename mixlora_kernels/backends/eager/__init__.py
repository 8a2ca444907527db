"""The stages in plain torch, for any device and any floating dtype, and for torch.compile."""

from ..base import Group
from ..node import Staged
from .decode import decode
from .expand import expand, expand_backward
from .project import project, project_backward


class Eager(Staged):
    """The backend called ``"torch"``."""

    name = "torch"
    writes_first = False

    def decodes(self, group: Group) -> bool:
        """``Backend.decodes``: always."""
        return True

    decode = staticmethod(decode)
    project = staticmethod(project)
    expand = staticmethod(expand)
    expand_backward = staticmethod(expand_backward)
    project_backward = staticmethod(project_backward)


EAGER = Eager()
