"""The documentation: generated parts are up to date, every file that it names is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOW = """
import runpy, sys
page = sys.argv.pop()
print(runpy.run_path(sys.argv.pop())["regenerated"](page), end="")
"""


@pytest.mark.parametrize("page", ["serving.md", "observability.md", "compatibility.md"])
def test_generated_parts_are_what_the_code_says(page):
    """In a process of its own: Prometheus's series exist once per process."""
    generate = ROOT / "docs" / "generate.py"
    made = subprocess.run(
        [sys.executable, "-c", SHOW, str(generate), page],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (ROOT / "docs" / page).read_text() == made.stdout, "run python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    """Names in backticks that end like a file: of the tree, of the package, or of its page."""
    for name in re.findall(r"`([\w./-]+\.(?:py|toml|sh|md|json|txt))`", page.read_text()):
        places = (ROOT, ROOT / "pascal_sglang", page.parent, ROOT / "docs", ROOT / "launch")
        found = any((place / name).exists() for place in places)
        ours = "/" in name and not name.startswith(("srt/", "/"))
        assert found or not ours, f"{page.name} names {name}"


def test_every_page_is_in_the_index():
    index = (ROOT / "README.md").read_text()
    assert [p.name for p in PAGES[2:] if f"docs/{p.name}" not in index] == []
