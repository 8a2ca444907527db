"""Links of the Markdown files outside of the site lead somewhere; the site's own are checked where it is built."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [*ROOT.glob("*.md"), *(ROOT / "integration").rglob("*.md")]


def broken(file: Path) -> list[str]:
    """The relative links whose file, or whose heading in it, is not there."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = (file.parent / name).resolve() if name else file
        if link.startswith(("http://", "https://")):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def anchors(file: Path) -> set[str]:
    """A Markdown file's headings as its readers' links spell them."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    assert broken(file) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.md").write_text(
        "# One: two\n[x](b.md) [y](#one-two) [z](#three) [w](a.md#one-two)", encoding="utf-8"
    )
    assert broken(tmp_path / "a.md") == ["b.md", "#three"]
