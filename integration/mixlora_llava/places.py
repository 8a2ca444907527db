"""Whether a folder for results can be made."""

from pathlib import Path


def in_the_way(folder: str | Path) -> Path | None:
    """The file that stands where a folder, or a folder above it, must be; None if the folder exists or can be made."""
    place = Path(folder)
    nearest = next((each for each in (place, *place.parents) if each.exists()), None)
    return None if nearest is None or nearest.is_dir() else nearest
