"""Links of the Markdown files that are no pages of the site lead somewhere; the site's own are checked as it is built."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
FILES = [name for name in LISTED if not name.startswith(("docs/", ".github/"))]


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


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name):
    assert broken(ROOT / name) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.md").write_text(
        "# One: two\n[x](b.md) [y](#one-two) [z](#three) [w](a.md#one-two)", encoding="utf-8"
    )
    assert broken(tmp_path / "a.md") == ["b.md", "#three"]
