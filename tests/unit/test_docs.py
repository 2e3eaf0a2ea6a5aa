"""The documentation: generated parts are up to date, every file that it names is there."""

import ast
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


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {page.with_suffix(".html").name for page in PAGES[2:]}
    assert pages <= {page.name for page in tmp_path.glob("*.html")}


def said(path):
    """Every text in a file of the package, with `…` where a value is filled in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[srd]", "…", node.value)


def test_every_message_that_is_explained_exists():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(messages) == 10
    texts = [t for path in (ROOT / "pascal_sglang").rglob("*.py") for t in said(path)]
    assert [m for m in messages if not any(m in text for text in texts)] == []
