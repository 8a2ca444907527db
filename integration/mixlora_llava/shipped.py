"""The files that travel with the package and are found by name: configurations, and what other commands are given."""

from pathlib import Path

from .refusal import Missing

HOME = Path(__file__).parent


def names() -> dict[str, Path]:
    """Every shipped file by name: configurations, Accelerate's, ms-swift's plug-in; lmms-eval's tasks are a folder."""
    files = sorted([*(HOME / "configs").glob("*.yaml"), *(HOME / "accelerate").glob("*.yaml")])
    plugin, tasks = HOME / "frameworks" / "ms_swift_plugin.py", HOME / "lmms" / "tasks"
    return {file.stem: file for file in [*files, plugin]} | {"lmms_tasks": tasks}


def path(name: str) -> Path:
    """Where a shipped file is.

    Raises:
        Missing: there is none of that name; the message lists those that exist.
    """
    if name not in (known := names()):
        raise Missing(f"nothing called {name!r} comes with the package: it has {', '.join(known)}")
    return known[name]


def configuration(name: str) -> Path:
    """A training's settings: a file that exists, or a shipped configuration by name.

    Raises:
        Missing: it is neither; the message lists the shipped ones.
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
