"""One server over four hosts of a Ray cluster, an instance on each: it serves as one on one host,
and what happens to a host happens to its own requests alone.

With `TEST_HOSTS=4`, or as many as there are to be: hosts take minutes, and two GB each.
"""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pascal_sglang.cluster.transport import problem_with
from pascal_sglang.config import CONFIG_ENV, ConfigError, PascalConfig
from tests import hosts
from tests.engine.load import run
from tests.engine.test_migration import at_rest, differences, nothing_left, total, wait_for
from tests.ray_hosts import PORT, RAY, RAY_PORT, HostServer, cluster, serving
from tests.requests import generate

pytestmark = [
    pytest.mark.skipif("TEST_HOSTS" not in os.environ, reason="takes minutes; TEST_HOSTS=4"),
    pytest.mark.timeout(1500),
]
COUNT = 60
HOSTS = int(os.environ.get("TEST_HOSTS", "4"))
ROOT = Path(__file__).parents[2]
INTRUDER = ROOT / "tests" / "intruder.py"
# For all processes of the cluster, and nobody else.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}


def moves():
    """What lets requests migrate between hosts, again and again; nothing where Mooncake does not
    load."""
    if problem_with("mooncake") is not None:
        return {}
    found = {"force_migration": 0.01, "kv_transport": "mooncake", "kv_listen": "198.18.0.0/24"}
    try:
        PascalConfig(**found)
    except ConfigError:
        return {}
    return found


MOVES = moves()


@pytest.fixture(scope="module")
def network():
    with hosts.network() as network:
        yield network


@pytest.fixture(scope="module")
def model(network):
    from pascal_sglang.demo.tiny import build_tiny_model

    return build_tiny_model(network.shared / "model")


@pytest.fixture(scope="module")
def several(network):
    with cluster(network, [1] * HOSTS, TOKEN) as several:
        yield several


def racks(several):
    """Two, of half of the hosts each; the addresses of one are no network."""
    return {host.address: "ab"[2 * i >= HOSTS] for i, host in enumerate(several)}


@pytest.fixture(scope="module")
def server(several, model):
    control = several[0].address
    settings = {
        "control_listen": control,
        "racks": ",".join(f"{rack}={address}" for address, rack in racks(several).items()),
    }
    flags = [part for n, v in settings.items() for part in (f"--pascal-{n.replace('_', '-')}", v)]
    moving = {CONFIG_ENV: PascalConfig(**settings, **MOVES).to_json()} if MOVES else {}
    with serving(several, model, [] if MOVES else flags, {**TOKEN, **moving}) as server:
        yield server


def reply_of(server, body):
    """The ids, or what was said instead, and seconds until then."""
    began = time.monotonic()
    try:
        said = server.post("/generate", body, timeout=120)["output_ids"]
    except urllib.error.HTTPError as error:
        said = (error.code, error.read().decode())
    return said, time.monotonic() - began


def takes_only_its_own_along(server, instance, loss):
    """loss: what happens to the instance's host while requests are served."""
    made = [generate(f"{loss} {i}", think=20 + i, total=800) for i in range(24)]
    with ThreadPoolExecutor(len(made)) as pool:
        began = time.monotonic()
        replies = [pool.submit(reply_of, server, {**b, "rid": uuid.uuid4().hex}) for b in made]
        wait_for(
            server,
            lambda shown: all(len(i["requests"]) > 1 for i in shown["instances"] if "pid" in i),
        )
        lost_at = time.monotonic() - began
        loss()
        replies = [reply.result() for reply in replies]
    failed = [(said, seconds) for said, seconds in replies if isinstance(said, tuple)]
    assert failed, "nobody was there"
    assert len(failed) < len(made), "nobody was elsewhere"
    for (code, text), _ in failed:
        assert code == 503
        assert "has died" in text
    print(f"503 at most {max(s for _, s in failed) - lost_at:.1f} s after {loss.__name__}")
    whole = [(b, s) for b, (s, _) in zip(made, replies, strict=True) if not isinstance(s, tuple)]
    with ThreadPoolExecutor(len(whole)) as pool:
        again = [pool.submit(reply_of, server, {**b, "rid": uuid.uuid4().hex}) for b, _ in whole]
        assert [reply.result()[0] for reply in again] == [said for _, said in whole]
    shown = server.get("/pascal/status")
    assert shown["controller"]["states"][instance] == "dead"
    nothing_left(at_rest(server))


def test_it_serves_over_its_hosts_as_on_one(several, server, reference):
    whole, _ = run(server, COUNT)
    instances = at_rest(server)
    assert differences(whole, reference) == []
    nothing_left(instances)
    assert [i["dp_rank"] for i in instances] == list(range(HOSTS))
    assert all(i["forecast"] is not None for i in instances)
    controller = server.get("/pascal/status")["controller"]
    assert all(controller["placed"][str(i)] > COUNT / HOSTS / 4 for i in range(HOSTS))
    names = {host.address: host.name for host in several}
    assert controller["sites"] == [
        {"host": names[address], "rack": rack} for address, rack in racks(several).items()
    ]
    if MOVES:
        moved = total(instances, "outgoing", "moved")
        assert moved > COUNT / 3
        assert all(i["migrations"]["incoming"].get("taken") for i in instances)
    assert (controller["rejected"], controller["errors"], controller["unsent"]) == ({}, {}, 0)


def test_what_its_instances_show_is_shown_where_it_serves(server):
    """Metrics, SGLang's figures of load and forecasts, all of them files of the instance's host."""

    def shown(instance):
        lines = server.get("/metrics").splitlines()
        return {line.partition("{")[0] for line in lines if f'dp_rank="{instance}"' in line}

    # Others have a label that an instance shows once it has something to count under it.
    wanted = {"sglang:num_running_reqs", "pascal:policy_passes_total", "pascal:backlog_seconds"}
    deadline = time.monotonic() + 10
    while missing := {i: wanted - shown(i) for i in range(HOSTS) if wanted - shown(i)}:
        assert time.monotonic() < deadline, missing
        time.sleep(0.2)
    loads = server.get("/v1/loads")["loads"]
    assert [each["dp_rank"] for each in loads] == list(range(HOSTS))
    assert all(each["max_total_num_tokens"] for each in loads)


def test_instances_elsewhere_are_refused_without_tcp(several, server, model):
    """SGLang would wait for their GPUs on one host without end."""
    server = HostServer(several[1], model, ["--dp-size", "2"], 0, TOKEN)
    try:
        assert server.process.wait(300) == 2
    finally:
        server.kill()
    last = server.output.strip().splitlines()[-1]
    assert "--use-ray needs 2 GPUs on this host, where Ray has 1; instances on other hosts" in last


def open_sockets(several):
    """Address and port of the TCP and UDP sockets that others can reach, with the process."""
    asked = ["ss", "--no-header", "--listening", "--tcp", "--udp", "--numeric", "--processes"]
    found = {}
    for host in several:
        for line in host.run(asked).splitlines():
            _, _, _, _, local, _, *process = line.split(maxsplit=6)
            address, _, port = local.rpartition(":")
            if not address.strip("[]").startswith(("127.", "::1", "::ffff:127.")):
                found[host.address, port] = " ".join(process)
    return found


def test_a_stranger_on_the_network_gets_nowhere(network, several, server):
    stranger = network.host()
    ours = re.findall(r"over TCP at ([0-9.]+):(\d+)", server.output)
    for address, ports in re.findall(r"over TCP at ([0-9.]+), ports ([0-9, ]+),", server.output):
        ours += [(address, port) for port in ports.split(", ")]
    # The controller's, each instance's own; and of each on another host: three here, one there.
    assert len(set(ours)) == 1 + HOSTS + 4 * (HOSTS - 1)
    said = stranger.run([sys.executable, INTRUDER, *map(":".join, ours)], timeout=300)
    for address, attempts in json.loads(said).items():
        assert all(each["connected"] for each in attempts), address
        assert not any(each["in"] or each["sent"] or each["read"] for each in attempts), address
    kv = {
        (address, port)
        for address, ports in re.findall(
            r"Mooncake listens on ([0-9.]+), ports ([^:]+):", server.output
        )
        for port in ports.split(" and ")
    }
    assert len(kv) == (2 * HOSTS if MOVES else 0)
    seen = open_sockets(several)
    assert seen.keys() >= {*ours, *kv}
    others = {at: process for at, process in seen.items() if at not in ours}
    said = stranger.run(
        [sys.executable, INTRUDER, "--others", *map(":".join, others)], timeout=300, cwd=ROOT
    )
    found = {at: json.loads(said)[":".join(at)] for at in others}
    for at, process in others.items():
        print(at, process, found[at])
    refused = {at for at in others if not found[at]["connected"]}
    assert refused >= kv
    # A worker of Ray's that had nothing to do may have ended meanwhile.
    assert not (refused - kv) & open_sockets(several).keys()
    http = several[0].address, str(PORT)
    for at in others.keys() - refused - {http}:
        calls, page = found[at]["calls"], found[at]["page"]
        # Ray's: it asks for the token, or shows metrics.
        assert "OK" not in calls.values(), (others[at], calls)
        assert page in (None, 200, 401), (others[at], page)
        assert page or "UNAUTHENTICATED" in calls.values(), others[at]
    peek = [*stranger.prefix, *RAY, "status", "--address", f"{several[0].address}:{RAY_PORT}"]
    done = subprocess.run(
        peek,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 64}},
        check=False,
    )
    assert done.returncode != 0
    assert isinstance(reply_of(server, generate("still here", 3, 8))[0], list)


def test_a_slow_link_makes_nothing_wrong(several, server, reference):
    """50 ms each way, and 1 % of the packets lost."""
    several[1].slow(0.05, loss=0.01)
    try:
        whole, _ = run(server, COUNT // 2)
        assert differences(whole, reference) == []
        nothing_left(at_rest(server))
    finally:
        several[1].fast()


def test_a_link_that_is_cut_for_ten_seconds(several, server):
    def cut():
        several[1].cut()
        time.sleep(10)
        several[1].restore()

    takes_only_its_own_along(server, 1, cut)
    # It lives, and Ray ends it.
    deadline = time.monotonic() + 120
    while schedulers(several[1]):
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.skipif(HOSTS < 3, reason="needs three hosts")
def test_a_host_that_freezes(several, server):
    takes_only_its_own_along(server, 2, several[2].freeze)


@pytest.mark.skipif(HOSTS < 4, reason="needs four hosts")
def test_a_host_that_is_switched_off(several, server):
    takes_only_its_own_along(server, 3, several[3].kill)


def test_the_last_one_serves_on(server, reference):
    whole, _ = run(server, COUNT)
    assert differences(whole, reference) == []
    assert server.process.poll() is None


def schedulers(host):
    found = []
    for process in host.processes():
        with suppress(psutil.NoSuchProcess):
            if "SchedulerActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture
def again(several, server, model):
    """Another server, on the two hosts that are left."""
    server.kill()
    flags = ["--pascal-control-listen", several[0].address]
    with serving(several[:2], model, flags, TOKEN) as again:
        yield again


def test_a_connection_that_is_reset_ends_an_instance_whose_tokens_may_be_lost(several, again):
    said = r"what instance 1 says comes in over TCP at ([0-9.]+), ports (\d+), (\d+),"
    address, *ports = re.search(said, again.output).groups()

    def reset():
        """As a firewall does that has lost its state."""
        several[1].run(["ss", "--kill", "--tcp", "--numeric", "dst", f"{address}:{ports[1]}"])

    takes_only_its_own_along(again, 1, reset)


def test_a_server_that_is_killed_leaves_nothing_on_other_hosts(several, again):
    """Ray notices later; the connections are closed at once."""
    assert len(reply_of(again, generate("again", 3, 8))[0]) == 8
    assert len(schedulers(several[1])) == 1
    again.kill()
    gone_by = time.monotonic() + 10
    while schedulers(several[1]):
        assert time.monotonic() < gone_by
        time.sleep(0.1)


def test_a_host_with_another_secret_ends_the_start(several, server, model):
    server.kill()
    for host in several[:2]:  # Each has a `/tmp` of its own.
        host.run(["sh", "-c", "umask 077; openssl rand -hex 32 > /tmp/secret"])
    flags = [
        "--pascal-control-listen",
        several[0].address,
        "--pascal-control-secret",
        "/tmp/secret",
    ]
    refused = HostServer(several[0], model, ["--dp-size", "2", *flags], 0, TOKEN)
    try:
        assert refused.process.wait(300) == 2
    finally:
        refused.kill()
    last = refused.output.strip().splitlines()[-1]
    assert "this host has another secret than the server" in last
