"""Check that the files and folders that the settings name exist, and that the output folder can be made."""

from pathlib import Path

from ..places import in_the_way
from ..refusal import Missing, Refusal
from .settings import Settings


def missing_files(settings: Settings) -> dict[str, str]:
    """The missing files and folders, by the setting that names them: records, images, definitions of tasks, and the
    projector. The model itself is not checked, because its name may be one on the hub."""
    named = {"data": settings.data, "task_definitions": settings.task_definitions}
    if isinstance(settings.model, dict):
        named["model.projector"] = settings.model.get("projector")
    found = {name: file for name, file in named.items() if file is not None and not Path(file).is_file()}
    return found if Path(settings.images).is_dir() else found | {"images": settings.images}


def say_missing(found: dict[str, str]) -> str:
    """One sentence that lists the result of ``missing_files`` and says what to do."""
    listed = ", ".join(f"{file} ({name})" for name, file in found.items())
    return (
        f"missing: {listed}; get them (the configuration's comments say where from), or give other paths in the "
        f"settings in parentheses, relative to the working directory {Path.cwd()}"
    )


def check_files(settings: Settings) -> None:
    """Refuse a run with missing files, before a model is loaded.

    Raises:
        Missing: a file or folder is missing. The message is that of ``say_missing``.
        Refusal: a file stands where the output folder must be.
    """
    if file := in_the_way(settings.output):
        raise Refusal(f"output must be a folder, and {file} is a file: give another output")
    if found := missing_files(settings):
        raise Missing(say_missing(found))
