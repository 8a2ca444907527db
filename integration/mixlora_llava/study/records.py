"""Raw results: a JSON file for each run. A file is written completely or not at all."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from ..refusal import Refusal
from .tuning import SEARCHED, Run

PACKAGES = ("torch", "transformers", "peft", "mlxtend", "numpy")


class Record(NamedTuple):
    """A finished run.

    Attributes:
        found: the result of ``tuning.run`` with ``seconds``; or ``failed``, the reason why there is no result.
        base: the digest of the base. Differences of methods are taken on the same base.
        made: versions, commit, processor and date.
    """

    run: Run
    found: dict
    base: str
    made: dict

    @property
    def chosen_by(self) -> float:
        """The accuracy by which a learning rate is chosen. It is -1 for a training that diverged."""
        return -1.0 if "failed" in self.found else self.found["accuracy"]["choose"]


def write(folder: Path, record: Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"run": record.run._asdict(), "base": record.base, "made": record.made, "found": rounded(record.found)}
    file = folder / f"{record.run.name}.json"
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(file)


def read(folder: Path) -> list[Record]:
    """Read all raw results of a folder.

    Raises:
        ValueError: a file is not a raw result, or its name belongs to another run.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            record = Record(Run(**content["run"]), content["found"], content["base"], content["made"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise Refusal(f"{file} is no raw result of the study: {error!r}") from error
        if record.run.name != file.stem:
            raise Refusal(f"{file} holds the run {record.run.name}")
        found.append(record)
    return found


def choices(records: Iterable[Record]) -> dict[Run, float]:
    """The accuracy of each run of a search, by which learning rates are chosen."""
    return {record.run._replace(detail=False): record.chosen_by for record in records if record.run.seed == SEARCHED}


def rounded(value):
    """Round floats to six digits, which is more precise than the report."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def made() -> dict:
    """The versions, commit, processor and date of a result."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {"versions": versions, "python": platform.python_version(), "commit": commit(), "cpu": cpu(), "date": now}


def commit() -> str | None:
    """The commit of the source, with ``-dirty`` if the package or the study has changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[3]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()  # fmt: skip

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))  # a copy may be in another repository
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--", "mixlora_kernels/**.py", "integration/mixlora_llava/**.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def cpu() -> str:
    """The processor's name, on Linux from /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
