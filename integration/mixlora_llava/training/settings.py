"""The settings of a training run: one YAML file. pydantic checks the types and ranges of its values."""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from peft import LoraConfig, PeftConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import TrainingArguments
from typing_extensions import NotRequired, TypedDict

from mixlora_kernels import MixLoRAConfig
from mixlora_kernels.peft import ConditionalMixLoRAConfig

from ..data.conversation import TEMPLATES
from ..refusal import Refusal
from .yaml_file import read_yaml

# The methods that the paper compares in Tables 1 and 2 and Figure 4, and the preset with tied pairs.
TIED = ConditionalMixLoRAConfig.tied()
METHODS = {
    "lora": None,
    "mixlora": {"routing": "instance"},
    "mixlora_tied": {name: getattr(TIED, name) for name in ("routing", "conditioning", "gate", "pool", "balance")},
    "mixlora_unconditional": {"routing": "instance", "conditioning": "none"},
    "mixlora_task": {"routing": "task"},
    "mixlora_task_unconditional": {"routing": "task", "conditioning": "none"},
    "mixlora_random": {"routing": "random"},
}
# No conversions: a text does not count as a number, and a number does not count as true or false.
STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
# ``train`` sets the TrainingArguments in FIXED. ``Settings`` has its own fields for those of MixLoRAConfig in OWN.
FIXED = {"output_dir", "remove_unused_columns", "label_names"}
OWN = {"r", "num_factors", "alpha", "dropout", "routing", "task_dim"}


# The ranges of TrainingArguments' fields, which it does not check itself.
RANGES = {
    "per_device_train_batch_size": Annotated[int, Field(ge=1)],
    "gradient_accumulation_steps": Annotated[int, Field(ge=1)],
    "num_train_epochs": Annotated[float, Field(gt=0)],
}


def some_fields(kind: type, without: set[str], ranges: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """A TypedDict of a dataclass's fields, except those in ``without``, with the types of the dataclass, or those in
    ``ranges``."""
    hints = typing.get_type_hints(kind) | dict(ranges)
    names = [entry.name for entry in dataclasses.fields(kind) if entry.init and entry.name not in without]
    made = TypedDict(kind.__name__, {name: hints[name] for name in names}, total=False)
    made.__pydantic_config__ = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )
    return made


class Parts(TypedDict):
    """A LLaVA v1 before instruction tuning; see ``model.load_llava``."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    language: str
    vision: str
    projector: NotRequired[str]


class Settings(BaseModel):
    """A training run.

    Args:
        model: a folder or hub name, or a LLaVA's parts; see ``model.load_llava``.
        data, images: a file of records and the folder of their images; see ``data``.
        output: the folder for checkpoints and the trained adapter.
        method: ``"lora"``, ``"mixlora"`` and its variants; see ``METHODS``.
        r: the number of factors chosen for each instance; for LoRA, the rank.
        num_factors: E, the number of factors in a pool.
        alpha: None means 2 E, or 2 r for LoRA, as in the paper.
        dropout: the probability of dropout of the input of ``lora_A``.
        mixlora: further fields of ``MixLoRAConfig``: ``conditioning``, ``gate``, ``pool``, ``decode``,
            ``balance``.
        train_projector: whether the projector is trained in full.
        template: the conversation's template; see ``conversation.TEMPLATES``.
        max_length: the longest text in tokens, with the image counted as one.
        check_images: ``"decode"``: decode all images before the training; ``"header"``: read their headers only.
        strict: whether a bad record stops the run.
        limit: use only this number of records, from the beginning of the file.
        task_definitions: a JSON file with a text for each ``task_name``, for ``routing="task"``.
        dtype: the dtype of the frozen model.
        device_tflops: the sustained speed of the device in 10^12 operations per second, to estimate the time without a
            measurement.
        training: fields of transformers' ``TrainingArguments``.

    Raises:
        pydantic.ValidationError: a ValueError. Its message names each field that is missing or unknown, or whose value
            has another type or is out of range.
    """

    model_config = STRICT

    model: Annotated[str, Field(min_length=1)] | Parts
    data: str = Field(min_length=1)
    images: str = Field(min_length=1)
    output: str = Field(min_length=1)
    method: Literal[tuple(METHODS)] = "mixlora"
    r: int = Field(4, ge=1)
    num_factors: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    mixlora: some_fields(MixLoRAConfig, OWN) = {}
    train_projector: bool = True
    template: Literal[tuple(TEMPLATES)] = "v1"
    max_length: int = Field(1792, ge=1)
    check_images: Literal["decode", "header"] = "decode"
    strict: bool = False
    limit: int | None = Field(None, ge=1)
    task_definitions: str | None = Field(None, min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device_tflops: float | None = Field(None, gt=0)
    training: some_fields(TrainingArguments, FIXED, RANGES) = {}

    @model_validator(mode="after")
    def _agree(self) -> "Settings":
        if (self.routing == "task") != (self.task_definitions is not None):
            raise ValueError(
                "task_definitions must be given with a method that routes by task and only then, got "
                f"method={self.method!r} and task_definitions={self.task_definitions!r}"
            )
        self.adapter(task_dim=1)  # refuses contradictory settings, such as r > num_factors
        return self

    @classmethod
    def read(cls, file: str | Path, **changes) -> "Settings":
        """Read settings from a YAML file. ``changes`` that are not None override its fields.

        Paths in the file are relative to the working directory.

        Raises:
            ValueError: the file is not YAML, or fields are wrong. The message names all of them.
        """
        given = read_yaml(file) | {name: value for name, value in changes.items() if value is not None}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            faults = error.errors(include_url=False)
            unknown = any(fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1 for fault in faults)
            known = f". Known fields are {', '.join(cls.model_fields)}" if unknown else ""
            raise Refusal(f"{file}: {'; '.join(map(_fault, faults))}{known}") from error

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


def _fault(error: Any) -> str:
    """One of pydantic's errors in one line: the field, the message, and the value."""
    place = ".".join(map(str, error["loc"]))
    got = "" if error["type"] in ("missing", "value_error") else f", got {error['input']!r}"
    return f"{place}: {error['msg']}{got}" if place else error["msg"]
