"""These tests run commands and notebooks in processes and folders of their own, which see what is installed."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    try:
        distribution("mixlora_kernels")
    except PackageNotFoundError:  # the pages show the command mixlora, which only an installation has; CI installs it
        reason = 'mixlora_kernels is not installed: pip install -c constraints.txt -e ".[test]"'
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.skip(reason=reason))
