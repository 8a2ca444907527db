"""The versions of vLLM that serving is tested with. Others are refused: not all that it rests on is public in vLLM."""

from packaging.version import InvalidVersion, Version

from ..versions import TESTED


def check_version(version: str) -> str | None:
    """What is wrong with a version of vLLM, as a sentence; None where it was tested."""
    oldest, newest = TESTED["vllm"]  # minor versions, with all their patches
    try:
        minor = Version(".".join(Version(version).base_version.split(".")[:2]))
        fits = Version(oldest) <= minor <= Version(newest)
    except InvalidVersion:
        fits = False
    if fits:
        return None
    return f"vLLM {version} is not among the versions tested, {oldest if oldest == newest else f'{oldest} to {newest}'}"
