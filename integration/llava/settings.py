"""What a training run is: one YAML file."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from peft import LoraConfig, PeftConfig
from transformers import TrainingArguments

from mixlora_kernels import MixLoRAConfig
from mixlora_kernels.peft import ConditionalMixLoRAConfig

from .conversation import TEMPLATES

# The one switch: what the paper compares, in Tables 1 and 2 and Figure 4.
METHODS = {
    "lora": None,
    "mixlora": {"routing": "instance"},
    "mixlora_unconditional": {"routing": "instance", "conditioning": "none"},
    "mixlora_task": {"routing": "task"},
    "mixlora_task_unconditional": {"routing": "task", "conditioning": "none"},
    "mixlora_random": {"routing": "random"},
}
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Settings:
    """A training run.

    Args:
        model: see ``model.load_llava``.
        data, images: a file of records and the folder of their images; see ``data``.
        output: where checkpoints and the trained adapter go.
        method: ``"lora"``, ``"mixlora"`` and its variants; see ``METHODS``.
        r: factors chosen for each instance; for LoRA, its rank.
        num_factors: E.
        alpha: None means 2 E, or 2 r for LoRA, as in the paper.
        dropout: of the input of ``lora_A``.
        mixlora: further fields of ``MixLoRAConfig``, such as ``gate``, ``pool``, ``decode``.
        train_projector: whether the projector is trained in full.
        template: of the conversation; see ``conversation.TEMPLATES``.
        max_length: tokens of text, the image counted as one.
        check_images: ``"decode"`` every image before the training, or read its ``"header"`` only.
        strict: whether bad records stop the run.
        limit: use the file's first records only.
        task_definitions: a JSON file of a text per ``task_name``, for ``routing="task"``.
        dtype: of the frozen model.
        device_tflops: what the device sustains, in 10^12 operations per second, for an estimate of the time without
            running anything.
        training: fields of transformers' ``TrainingArguments``.

    Raises:
        ValueError: an unknown field or value.
    """

    model: str | dict
    data: str
    images: str
    output: str
    method: str = "mixlora"
    r: int = 4
    num_factors: int = 16
    alpha: float | None = None
    dropout: float = 0.05
    mixlora: dict = field(default_factory=dict)
    train_projector: bool = True
    template: str = "v1"
    max_length: int = 1792
    check_images: str = "decode"
    strict: bool = False
    limit: int | None = None
    task_definitions: str | None = None
    dtype: str = "auto"
    device_tflops: float | None = None
    training: dict = field(default_factory=dict)

    def __post_init__(self):
        choices = {"method": METHODS, "check_images": ("decode", "header"), "template": TEMPLATES, "dtype": DTYPES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if (self.routing == "task") != (self.task_definitions is not None):
            raise ValueError(
                "task_definitions must be given with a method that routes by task and only then, got "
                f"method={self.method!r} and task_definitions={self.task_definitions!r}"
            )
        if unknown := sorted(set(self.mixlora) - {entry.name for entry in dataclasses.fields(MixLoRAConfig)}):
            raise ValueError(f"mixlora has fields that MixLoRAConfig does not have: {unknown}")
        arguments = {entry.name: entry.default for entry in dataclasses.fields(TrainingArguments)}
        if unknown := sorted(set(self.training) - arguments.keys()):
            raise ValueError(f"training has fields that TrainingArguments does not have: {unknown}")
        if "output_dir" in self.training:
            raise ValueError("give output, not training.output_dir")
        self.training = dict(self.training)
        for name, value in self.training.items():
            if isinstance(value, str) and isinstance(
                arguments[name], (int, float)
            ):  # what YAML makes of 4e-5, without a dot
                try:
                    self.training[name] = float(value)
                except ValueError:
                    raise ValueError(f"training.{name} must be a number, got {value!r}") from None

    @classmethod
    def read(cls, file: str | Path, **changes) -> "Settings":
        """Read a YAML file; ``changes`` that are not None take the place of what it says.

        Paths in the file are relative to the working directory.
        """
        try:
            given = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not YAML: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{file} must hold fields and values")
        given |= {name: value for name, value in changes.items() if value is not None}
        known = {entry.name: entry for entry in dataclasses.fields(cls)}
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"{file} has unknown fields {unknown}; known are {', '.join(known)}")
        if missing := [name for name in ("model", "data", "images", "output") if name not in given]:
            raise ValueError(f"{file} lacks {missing}")
        return cls(**given)

    @property
    def routing(self) -> str | None:
        method = METHODS[self.method]
        return None if method is None else method["routing"]

    def adapter(self, task_dim: int | None = None) -> PeftConfig:
        """The adapter's configuration; ``task_dim`` is the width of the task embeddings."""
        if METHODS[self.method] is None:
            alpha = 2 * self.r if self.alpha is None else self.alpha
            return LoraConfig(r=self.r, lora_alpha=alpha, lora_dropout=self.dropout, task_type="CAUSAL_LM")
        return ConditionalMixLoRAConfig(
            r=self.r,
            num_factors=self.num_factors,
            alpha=self.alpha,
            dropout=self.dropout,
            task_dim=task_dim if self.routing == "task" else None,
            task_type="CAUSAL_LM",
            **(METHODS[self.method] | self.mixlora),
        )
