"""The files and folders that settings name: whether they are there, and what to do where they are not."""

from pathlib import Path

from ..refusal import Missing
from .settings import Settings


def missing_files(settings: Settings) -> dict[str, str]:
    """What is not there, by the setting that names it: records, images, definitions of tasks, the parts of a model that
    are files. A model's name may be one of the hub's, and is not looked for."""
    named = {"data": settings.data, "task_definitions": settings.task_definitions}
    if isinstance(settings.model, dict):
        named["model.projector"] = settings.model.get("projector")
    found = {name: file for name, file in named.items() if file is not None and not Path(file).is_file()}
    return found if Path(settings.images).is_dir() else found | {"images": settings.images}


def say_missing(found: dict[str, str]) -> str:
    """One sentence that names what ``missing_files`` found and says what to do."""
    listed = ", ".join(f"{file} ({name})" for name, file in found.items())
    return (
        f"missing: {listed}; get them (the configuration's comments say where from), or give other paths in the "
        f"settings in parentheses, relative to the working directory {Path.cwd()}"
    )


def check_files(settings: Settings) -> None:
    """Refuse a run whose files are not there, before a model is loaded.

    Raises:
        Missing: with ``say_missing``'s sentence.
    """
    if found := missing_files(settings):
        raise Missing(say_missing(found))
