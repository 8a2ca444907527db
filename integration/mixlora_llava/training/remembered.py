"""The settings of a run, beside its adapter: written when it begins, compared when it resumes, and read by whoever asks
the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.conversation import TEMPLATES
from ..refusal import Refusal

if TYPE_CHECKING:
    from .settings import Settings  # pydantic and peft, which the commands' arguments do not need

SETTINGS = "settings.json"
LATER = {"strict", "device_tflops"}  # these may change when a run resumes, because they do not change its result


def remember(settings: Settings, output: Path, resumes: bool) -> None:
    """Write the settings beside the checkpoints; when a run resumes, compare them.

    Raises:
        ValueError: the run that resumes has other settings.
    """
    file = output / SETTINGS
    now = settings.model_dump(mode="json")
    if resumes and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in now if now[name] != before.get(name) and name not in LATER]
        if changed:
            differences = "; ".join(f"{name}: {before.get(name)!r}, now {now[name]!r}" for name in changed)
            raise Refusal(
                f"{output} holds a run with other settings ({differences}): give another output, or delete it"
            )
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=2), encoding="utf-8")


def trained_template(adapter: str | Path) -> str | None:
    """The template that an adapter was trained with, or None for an adapter without this package's record.

    Args:
        adapter: the output folder of a run, or a checkpoint in it.
    """
    folder = Path(adapter).resolve()
    if folder.name.startswith("checkpoint-"):
        folder = folder.parent
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["template"]
        return found if found in TEMPLATES else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no record, or another program's file of this name
