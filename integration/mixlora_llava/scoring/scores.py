"""Score a folder of predictions: accuracy by task, MMAvg, POPE and MME."""

import json
from pathlib import Path

from ..refusal import Refusal
from . import mme, pope
from .answers import failed
from .exact import Judge
from .resuming import DIGEST

# The seven sets whose mean is the paper's MMAvg, and the files of their predictions.
MM_SETS = {
    "Text-VQA": ("text_vqa",),
    "VSR": ("visual_spatial_reasoning",),
    "SNLI-VE": ("snli_ve_classification",),
    "CIFAR-10": ("cifar_10",),
    "CIFAR-100": ("cifar_100",),
    "MNIST": ("mnist",),
    "Pope": ("pope_rand", "pope_pop", "pope_adv"),
}


def read_predictions(file: str | Path) -> list[dict]:
    """Read rows in the released format."""
    with Path(file).open(encoding="utf-8") as lines:  # not splitlines(), which also splits at U+2028 within a text
        return [json.loads(line) for line in lines]


def score_folder(folder: str | Path, judge: Judge) -> dict:
    """Score each ``TASK.jsonl`` in a folder.

    Returns:
        ``tasks``: for each task ``accuracy``, in percent by the judge; ``count``; ``unclear``, the number of verdicts
        that are neither yes nor no, which count as wrong; and ``errors``, the number of images that could not be used.
        POPE's tasks also have ``pope``, the official figures without these images; see ``pope.score_predictions``.
        ``average``: over all tasks but MME's.
        ``mm_avg``: the paper's MMAvg, None if a set is missing; ``mm_sets``, its parts.
        ``mme``: the official scores, if all 14 subtasks exist. The folder ``mme`` then has their ``.txt`` files for the
        tool. If some are missing, files of these names are tasks like others.

    Raises:
        ValueError: the files hold answers of several models or adapters.
    """
    folder, tasks = Path(folder), {}
    files = {file.stem: read_predictions(file) for file in sorted(folder.glob("*.jsonl"))}
    whose = {row.get("metadata", {}).get(DIGEST): name for name, rows in files.items() for row in rows}
    if len(whose) > 1:
        raise Refusal(
            f"{folder} holds answers of several models or adapters, such as those in {' and '.join(whose.values())}: "
            "give each an output of its own"
        )
    subtasks = {*mme.PERCEPTION, *mme.COGNITION}
    whole = subtasks <= files.keys()
    for name, rows in files.items():
        if whole and name in subtasks:
            (folder / "mme").mkdir(exist_ok=True)
            mme.write_subtask(folder / "mme" / f"{name}.txt", rows)
        else:
            tasks[name] = score_task(name, rows, judge)
    sets = {
        name: _mean([tasks[task]["accuracy"] for task in members if task in tasks]) for name, members in MM_SETS.items()
    }
    return {
        "tasks": tasks,
        "average": _mean([task["accuracy"] for task in tasks.values()]),
        "mm_sets": sets,
        "mm_avg": None if None in sets.values() else _mean(list(sets.values())),
        "mme": mme.score_folder(folder / "mme") if whole else None,
    }


def score_task(name: str, rows: list[dict], judge: Judge) -> dict:
    # A judge may call an empty answer right; one that could not be given counts as wrong.
    verdicts = [False if failed(row) else verdict for row, verdict in zip(rows, judge(rows))]
    score = {
        "accuracy": 100 * verdicts.count(True) / len(rows) if rows else None,
        "count": len(rows),
        "unclear": verdicts.count(None),
        "errors": sum(map(failed, rows)),
    }
    return score | ({"pope": pope.score_predictions(rows)} if name.startswith("pope") else {})


def _mean(values: list[float | None]) -> float | None:
    values = [value for value in values if value is not None]  # a file without rows has no accuracy
    return sum(values) / len(values) if values else None
