"""What the status says of the whole server, and the page that shows it."""

import re
from html.parser import HTMLParser

from pascal_sglang.entrypoints.live_page import headers, page
from pascal_sglang.entrypoints.server_facts import at_most, rounded


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *each) for each in attrs]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_from_elsewhere():
    tags = Tags()
    tags.feed(page())
    assert tags.open == []
    assert not [each for each in tags.attributes if each[1] in ("src", "href", "style")]
    assert "//" not in re.sub(r"(?m)^ *//.*$", "", page())
    assert not re.search(r"\bon\w+=", page())


def test_what_the_server_says_is_never_markup():
    ways = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\("
    assert not re.search(ways, page())
    policy = dict(part.split(" ", 1) for part in headers()["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in headers()["Content-Security-Policy"]


def test_numbers_have_few_digits():
    shown = {"s": [0.1 + 0.2, 123456789.123, 1e-7 / 3], "n": 1234567890, "ok": True, "none": None}
    assert rounded(shown) == {
        "s": [0.3, 123457000.0, 3.33333e-08],
        "n": 1234567890,
        "ok": True,
        "none": None,
    }


def test_a_bounded_list_says_what_it_leaves_out():
    instance = {"dp_rank": 0, "requests": [1, 2, 3], "recent": [4, 5, 6]}
    assert at_most(instance, 2) == {
        "dp_rank": 0,
        "requests": [1, 2],
        "recent": [5, 6],
        "more_requests": 1,
    }
    assert at_most(instance, 0)["requests"] == at_most(instance, 0)["recent"] == []
    assert at_most({"dp_rank": 1, "state": "dead"}, 5)["more_requests"] == 0
