"""ModelInputs: the arguments of a whole model's forward that routing depends on."""

from typing import Any

from torch import Tensor


class ModelInputs:
    """The arguments of a whole model's forward that routing depends on.

    Args:
        labels: [B, L], the tokens to predict. Labels of other shapes, such as a classifier's, are ignored.
        logits_to_keep: the number of last tokens whose logits are computed.
        task, task_mask: a task embedding and its mask.
        generates: whether the model can generate. Only then are labels tokens.
    """

    def __init__(
        self, labels: Tensor | None = None, logits_to_keep: Any = None, task: Tensor | None = None,
        task_mask: Tensor | None = None, generates: bool = True,
    ):  # fmt: skip
        self.labels = labels if generates and labels is not None and labels.dim() == 2 else None
        self.logits_to_keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        self.task, self.task_mask, self.generates = task, task_mask, generates
