"""Read YAML such that ``4e-5`` is a number, and a field that is given twice is an error."""

import re
from pathlib import Path
from typing import Any

import yaml

from ..refusal import Refusal


class Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, in which a number with an exponent needs a dot and a sign. It silently takes the last of
    two equal keys."""

    def construct_mapping(self, node, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise yaml.constructor.ConstructorError(
                "while reading a mapping", node.start_mark, f"found {', '.join(twice)} more than once", node.start_mark
            )
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Read the fields and values of a file.

    Raises:
        ValueError: the file is not YAML, gives a field twice, or does not consist of fields.
    """
    try:
        given = yaml.load(Path(file).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(given, dict):
        raise Refusal(f"{file} must hold fields and values, got {type(given).__name__}")
    return given
