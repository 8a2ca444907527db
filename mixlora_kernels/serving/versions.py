"""The versions of vLLM that serving is tested with. Others are refused: not all that it rests on is public in vLLM."""

from packaging.version import InvalidVersion, Version

OLDEST, BELOW = "0.32.0", "0.33"


def check_version(version: str) -> str | None:
    """What is wrong with a version of vLLM, as a sentence; None where it was tested."""
    try:
        fits = Version(OLDEST) <= Version(Version(version).public) < Version(BELOW)
    except InvalidVersion:
        fits = False
    if fits:
        return None
    return f"vLLM {version} is not among the versions tested, {OLDEST} up to but not including {BELOW}"
