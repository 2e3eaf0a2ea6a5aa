"""docs/security.md says of every way in what the tests hold it to."""

import re
from pathlib import Path

import pytest

from tests.doors import TABLE

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "security.md").read_text()


def test_the_table_in_the_docs_is_the_one_that_is_tested():
    rows = re.findall(r"^\| ([^|]+?) \| [^|]+ \| (\w+)[^|]* \|[^|]+\|$", DOCS, re.MULTILINE)
    listed = {name: user for name, user in rows if name not in ("What", "---")}
    said = {True: ("yes",), False: ("no",), None: ("by", "yes")}
    assert list(listed) == [door.name for door in TABLE]
    assert [d.name for d in TABLE if listed[d.name] not in said[d.user]] == []


@pytest.mark.parametrize("test", sorted(set(re.findall(r"`(test_\w+)`", DOCS))))
def test_the_tests_that_it_names_exist(test):
    assert any(f"def {test}(" in path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
