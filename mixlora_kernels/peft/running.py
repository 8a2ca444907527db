"""Running: the forward that a thread runs."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .model_inputs import ModelInputs

if TYPE_CHECKING:
    from .forward_pass import ForwardPass


class Running:
    """The forward that one thread runs.

    Attributes:
        inputs: the arguments of the whole model's forward; None if none runs.
        forward_pass: the decoder's forward; None if none runs.
        passes: the forwards of the decoder, and of the encoder, in the whole model's forward.
        task: a task embedding and its mask for every forward, set by ``task_embedding``.
        uncached: the token ids of the thread's last forward, if ``uncached_ids`` has any.
    """

    def __init__(self) -> None:
        self.inputs: ModelInputs | None = None
        self.forward_pass: ForwardPass | None = None
        self.passes: list[ForwardPass] = []
        self.task: tuple[Tensor | None, Tensor | None] = (None, None)
        self.uncached: Tensor | None = None
        self._outer: list[tuple] = []  # forwards of the same model, in which this one runs

    def enter(self, inputs: ModelInputs) -> None:
        """Begin a forward of the whole model."""
        self._outer.append((self.inputs, self.forward_pass, self.passes))
        self.inputs, self.forward_pass, self.passes = inputs, None, []

    def leave(self) -> "tuple[ModelInputs | None, Sequence[ForwardPass]]":
        """End it: its inputs, and the forwards of its decoder and encoder."""
        ended = self.inputs, self.passes
        self.inputs, self.forward_pass, self.passes = self._outer.pop() if self._outer else (None, None, [])
        return ended


class EachThread(threading.local):
    """Holds the ``Running`` of each thread. It is a separate object, because torch.compile cannot trace assignments to
    attributes of a thread-local one."""

    def __init__(self) -> None:
        self.running = Running()
