"""The stages as Triton kernels, registered as ``torch.ops.mixlora_kernels.*``. Importing this imports Triton."""

import os

from ..node import Staged
from .decode import decode, decodes
from .expand import expand
from .expand_backward import expand_backward
from .project import project
from .project_backward import project_backward


class Kernels(Staged):
    """The backend called ``"triton"``."""

    name = "triton"
    # Off until a GPU has shown that cuBLAS's product loses less by accumulating than the kernels gain.
    writes_first = os.environ.get("MIXLORA_WRITES_FIRST", "0") == "1"

    decodes = staticmethod(decodes)
    decode = staticmethod(decode)
    project = staticmethod(project)
    expand = staticmethod(expand)
    expand_backward = staticmethod(expand_backward)
    project_backward = staticmethod(project_backward)


KERNELS = Kernels()
