"""Find the files in the package by name: configurations, and files for other commands."""

from pathlib import Path

from .refusal import Missing

HOME = Path(__file__).parent


def names() -> dict[str, Path]:
    """All shipped files by name: training configurations, Accelerate's configurations, ms-swift's plug-in, and the
    folder of lmms-eval's tasks."""
    files = sorted([*(HOME / "configs").glob("*.yaml"), *(HOME / "accelerate").glob("*.yaml")])
    plugin, tasks = HOME / "frameworks" / "ms_swift_plugin.py", HOME / "lmms" / "tasks"
    return {file.stem: file for file in [*files, plugin]} | {"lmms_tasks": tasks}


def path(name: str) -> Path:
    """The path of a shipped file.

    Raises:
        Missing: no shipped file has this name. The message lists the names.
    """
    if name not in (known := names()):
        raise Missing(f"nothing called {name!r} comes with the package: it has {', '.join(known)}")
    return known[name]


def configuration(name: str) -> Path:
    """The path of a training's settings, from a path or the name of a shipped configuration.

    Raises:
        Missing: ``name`` is neither. The message lists the shipped configurations.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {file.stem: file for file in sorted((HOME / "configs").glob("*.yaml"))}
    if name not in shipped:
        raise Missing(
            f"{name!r} is neither a file nor a configuration that comes with the package: give a YAML file, or one of "
            f"the names {', '.join(shipped)}"
        )
    return shipped[name]
