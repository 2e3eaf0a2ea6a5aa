"""Instances say at start at which level they run; the server says it, or refuses."""

import pytest

from pascal_sglang.config import CONFIG_ENV, PascalConfig
from pascal_sglang.entrypoints.http_server import shake_hands
from pascal_sglang.handshake import handed_on, hosts_by_instance, introduced, support_of
from pascal_sglang.support import EVERYTHING, Level, Support

WINDOWS = Support(Level.ORDER, ("a pool with sliding windows",))


@pytest.fixture
def asked(monkeypatch):
    def ask(level):
        monkeypatch.setenv(CONFIG_ENV, PascalConfig(require=level).to_json())

    monkeypatch.setattr("pascal_sglang.entrypoints.http_server._status_files", [])
    ask("observe")
    return ask


def test_the_lowest_level_of_all_instances_is_the_servers(asked, capsys):
    infos = [introduced({}, 0, EVERYTHING), introduced({}, 1, WINDOWS)]
    assert support_of(infos) == WINDOWS
    shake_hands([handed_on({}, "status", "place", support_of(infos))])
    assert capsys.readouterr().err == ("pascal_sglang: level order (a pool with sliding windows)\n")


def test_a_pool_that_leaves_less_than_required_stops_the_server(asked):
    asked("recompute")
    with pytest.raises(RuntimeError) as refused:
        shake_hands([introduced({}, 0, WINDOWS)])
    assert str(refused.value) == (
        "pascal_sglang refuses to serve: --pascal-require recompute: the level here is order, "
        "because of a pool with sliding windows"
    )
    asked("order")
    shake_hands([introduced({}, 0, WINDOWS)])


def test_an_instance_is_where_its_first_process_is(asked, monkeypatch):
    infos = []
    for host, instance in (("a", 0), ("b", 0), ("b", 1)):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        infos.append(introduced({}, instance, EVERYTHING))
    assert hosts_by_instance(infos) == {0: "a", 1: "b"}
    assert hosts_by_instance([{"pascal_process": (1, 3)}]) == {3: ""}, "of one that does not say it"
