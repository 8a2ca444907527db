"""Find the checkpoint that a run resumes from, and end a run whose last step was taken already."""

import json
import logging
import shutil
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)
STATE = "trainer_state.json"  # the Trainer writes it last into a checkpoint
ADAPTER = ("adapter_config.json", "README.md", "training_args.bin", "adapter_model.safetensors")


class Checkpoint(NamedTuple):
    """A complete checkpoint.

    Attributes:
        folder: its folder.
        state: the Trainer's state, as in the checkpoint's file.
    """

    folder: Path
    state: dict

    @property
    def is_final(self) -> bool:
        """Whether it was written after the run's last step. The Trainer would take one more step from there."""
        return 0 < self.state.get("max_steps", -1) <= self.state.get("global_step", 0)

    def place_adapter(self, output: Path) -> None:
        """Copy the adapter to the output folder. A run that is killed meanwhile leaves no half-written file."""
        for name in ADAPTER:
            if (self.folder / name).is_file():
                part = output / f"{name}.part"
                shutil.copyfile(self.folder / name, part)
                part.replace(output / name)


def last_checkpoint(output: Path) -> Checkpoint | None:
    """The last complete checkpoint in the output folder of a run, or None."""
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    for folder in found:
        try:
            return Checkpoint(folder, json.loads((folder / STATE).read_text(encoding="utf-8")))
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning("%s was not written to its end, and is not used", folder)
    return None
