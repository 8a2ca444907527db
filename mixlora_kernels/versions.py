"""The version of this package, and the tested versions of other libraries. setup.py runs this file, so that it imports
nothing else of the package."""

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

# The oldest and the newest tested release of each library. setup.py takes its lower bounds from here. CI runs the
# tests with constraints.txt, constraints-newest.txt and constraints-oldest.txt, all of them with torch 2.13. With
# other releases of torch the tests of the layer and tests/peft are run by hand, last on 2026-11-30: with torch 2.15.0
# on Python 3.12 all pass; with torch 2.6.0 on Python 3.10 all but those of torch.compile on a whole model, which does
# not trace peft's forward there, one that counts how often a layer is compiled, and those of FSDP2, which has no CPU
# there; TRL's were not run. transformers before 5.17 computes T5's positions in float32 whatever the model's dtype,
# and before 5.13 fails in prompt look-up without an end-of-text token. TRL before 1.15 trains DPO without labels, and
# then nothing tells where a prompt ends.
TESTED = {
    "torch": ("2.6", "2.15"),
    "triton": ("3.7", "3.9"),
    "transformers": ("5.17", "5.24"),
    "peft": ("0.21", "0.21"),
    "accelerate": ("1.10", "1.15"),
    "trl": ("1.15", "1.16"),
    "vllm": ("0.32", "0.32"),
}


class UntestedVersionWarning(UserWarning):
    """An installed library is older or newer than the versions that were tested."""


def warn_of_untested(*names: str) -> None:
    """Warn of the libraries whose installed version is outside the tested range, all in one warning.

    A library that is not installed causes no warning. The comparison uses as many numbers as the range gives: 5.24.3 is
    inside a range that ends with 5.24.

    Args:
        names: some of ``TESTED``.
    """
    outside = []
    for name in names:
        oldest, newest = TESTED[name]
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if not _numbers(oldest) <= _numbers(installed) or _numbers(installed)[: len(_numbers(newest))] > _numbers(
            newest
        ):
            outside.append(f"{name} {installed} (tested: {oldest} to {newest})")
    if outside:
        warnings.warn(
            f"mixlora_kernels {__version__} was not tested with {', '.join(outside)}: results may be wrong. Install a "
            "tested version, or run the tests of the clone with yours",
            UntestedVersionWarning,
            stacklevel=3,
        )


def _numbers(release: str) -> tuple[int, ...]:
    """The numbers of a release: (2, 13, 0) for ``2.13.0+cpu``."""
    found = re.match(r"\d+(\.\d+)*", release)
    if found is None:
        raise ValueError(f"a version must begin with a number, got {release!r}")
    return tuple(int(number) for number in found.group().split("."))
