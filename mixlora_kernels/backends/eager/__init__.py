"""The stages in plain torch: on any device, in any floating dtype, under any compiler."""

from ..node import Staged
from .decode import decode
from .expand import expand, expand_backward
from .project import project, project_backward


class Eager(Staged):
    """The backend called ``"torch"``."""

    name = "torch"
    writes_first = False

    def decodes(self, group):
        """``Backend.decodes``: any number of tokens."""
        return True

    decode = staticmethod(decode)
    project = staticmethod(project)
    expand = staticmethod(expand)
    expand_backward = staticmethod(expand_backward)
    project_backward = staticmethod(project_backward)


EAGER = Eager()
