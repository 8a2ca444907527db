"""ModelInputs: what a whole model's forward is given that decides the routing."""

from typing import Any

from torch import Tensor


class ModelInputs:
    """The arguments of a whole model's forward that decide the routing.

    Args:
        labels: [B, L], the answers' tokens; other shapes (a classifier's) say nothing about tokens.
        logits_to_keep: of how many last tokens the logits are wanted.
        task, task_mask: a task embedding.
        generates: whether the model is one that generates, so that labels are tokens to be predicted.
    """

    def __init__(
        self, labels: Tensor | None = None, logits_to_keep: Any = None, task: Tensor | None = None,
        task_mask: Tensor | None = None, generates: bool = True,
    ):  # fmt: skip
        self.labels = labels if generates and labels is not None and labels.dim() == 2 else None
        self.logits_to_keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        self.task, self.task_mask, self.generates = task, task_mask, generates
