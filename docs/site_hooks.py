"""What the site needs beyond `docs/`: the README and CONTRIBUTING as pages, and the files of the
repository that pages link to. So every link works on a code host and in the site alike.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Pages from outside `docs/`, by what they are called in the site.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside, and every file of the repository that a page links to."""
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    for page in list(files.documentation_pages()):
        for target in _linked(page.src_uri, page.content_string):
            if (ROOT / target).exists() and _in_site(target).startswith("files/"):
                _add(files, config, target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the repository as links of the site."""
    name = page.file.src_uri
    return LINK.sub(lambda link: f"]({_in_site(_target(name, link[1]))}{link[2] or ''})", markdown)


def _linked(page: str, text: str) -> list[str]:
    return [_target(page, link[1]) for link in LINK.finditer(text)]


def _target(page: str, link: str) -> str:
    """The file of the repository that a link on a page leads to."""
    folder = "" if page in PAGES else "docs"
    return posixpath.normpath(posixpath.join(folder, link))


def _in_site(target: str) -> str:
    """Where a file of the repository is in the site, all of whose pages lie side by side."""
    for name, source in PAGES.items():
        if target == source:
            return name
    if target.startswith("docs/") and target.endswith(".md"):
        return target.removeprefix("docs/")
    folder = (ROOT / target).is_dir()
    return f"files/{target}/index.txt" if folder else f"files/{target}.txt"


def _add(files: Any, config: Any, target: str) -> None:
    """A file as text; of a folder, the names in it."""
    path, uri = ROOT / target, _in_site(target)
    if files.get_file_from_path(uri) is not None:
        return
    if path.is_dir():
        names = "".join(f"{each.name}\n" for each in sorted(path.iterdir()))
        files.append(File.generated(config, uri, content=names))
    else:
        files.append(File.generated(config, uri, abs_src_path=str(path)))
