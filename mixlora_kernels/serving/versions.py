"""The tested versions of vLLM. Other versions are refused, because serving also needs parts of vLLM that are not
public."""

from packaging.version import InvalidVersion, Version

from ..versions import TESTED


def check_version(version: str) -> str | None:
    """Return a sentence that refuses a version of vLLM, or None if it was tested."""
    oldest, newest = TESTED["vllm"]  # minor versions, with all their patches
    try:
        minor = Version(".".join(Version(version).base_version.split(".")[:2]))
        fits = Version(oldest) <= minor <= Version(newest)
    except InvalidVersion:
        fits = False
    if fits:
        return None
    return f"vLLM {version} is not among the versions tested, {oldest if oldest == newest else f'{oldest} to {newest}'}"
