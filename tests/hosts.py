"""Hosts on a network, made of Linux namespaces.

Each host has its own address, name, process ids, clock, `/tmp` and `/dev/shm`; the rest of its
files is that of the machine, as on hosts that mount one share. All hosts hang on one switch, which
leads nowhere else. Nothing has a name outside of its namespaces, so that several runs never meet,
and all of it ends with the process that made it, however that process ends.

    with hosts.network() as network:
        first, second = network.host(), network.host()
        server = first.popen(["python3", "-m", "http.server", "--bind", first.address])
        second.cut()
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

SUBNET = "198.18.0"  # RFC 2544: for tests of networks.
MOST_HOSTS = 9
CLONE_NEWNET = 0x40000000  # linux/sched.h
_TOOLS = ("ip", "mount", "nsenter", "unshare")
_SLOW_LINK = Path(__file__).with_name("slow_link.py")
_WAIT_S = 30
_starts = itertools.count(1)

# The first process of a host: all others of the host end with it, and it with its standard input.
# What it ignores it inherits to `cat`, and with SIGCHLD ignored the kernel reaps orphans.
_INIT = """
hostname "$1"
for folder in /tmp /dev/shm; do mount -t tmpfs -o mode=1777 "$1" "$folder"; done
mount --bind "$2/hosts" /etc/hosts
if [ -e /etc/resolv.conf ]; then mount --bind "$2/resolv.conf" /etc/resolv.conf; fi
ip link set lo up
trap '' CHLD
echo ready
exec cat
"""


class NoHosts(Exception):
    """Hosts cannot be made on this machine; the text says why."""


class HostProcess(subprocess.Popen[Any]):
    """A process on a host. `pid` is that of `nsenter`, whose only child is the process itself;
    signals go to the child."""

    def send_signal(self, sig: int) -> None:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children():
                child.send_signal(sig)
                return
        super().send_signal(sig)


class _Namespaces:
    """The namespaces of one host, or of the switch."""

    def __init__(self, name: str, etc: Path) -> None:
        self.name = name
        private = "--net --mount --uts --pid --time --fork --kill-child --mount-proc".split()
        # Clocks that only grow have no common beginning.
        private += ["--monotonic", str(1000 * next(_starts)), "--boottime", "0"]
        self._unshare = subprocess.Popen(
            ["unshare", *private, "sh", "-ec", _INIT, "init", name, str(etc)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._unshare.stdout is not None
        assert self._unshare.stderr is not None
        if self._unshare.stdout.readline() != "ready\n":
            self.end()
            raise NoHosts(f"no namespaces: {self._unshare.stderr.read().strip()}")
        (init,) = psutil.Process(self._unshare.pid).children()
        self.init: int = init.pid
        self._processes = os.readlink(f"/proc/{self.init}/ns/pid")
        enter = f"nsenter --target {self.init} --net --mount --uts --pid --time --".split()
        # What runs a command here.
        self.prefix: tuple[str, ...] = tuple(enter)

    def ip(self, *words: str) -> None:
        # Of our network only: `ip` finds another host's by a process id of this machine.
        enter = ["nsenter", "--target", str(self.init), "--net", "--"]
        subprocess.run([*enter, "ip", *words], check=True, capture_output=True, timeout=_WAIT_S)

    def processes(self) -> list[psutil.Process]:
        """All processes here but the first one."""
        found = []
        for process in psutil.process_iter():
            with suppress(OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == self._processes:
                    found.append(process)
        return [process for process in found if process.pid != self.init]

    def end(self) -> None:
        """End every process here; the network devices go with the last one."""
        if self._unshare.poll() is None:
            with suppress(ProcessLookupError):
                for child in psutil.Process(self._unshare.pid).children():
                    os.kill(child.pid, signal.SIGKILL)
        # The pipe's end also ends a first process that had not begun.
        assert self._unshare.stdin is not None
        self._unshare.stdin.close()
        self._unshare.wait(_WAIT_S)


class Host:
    """A host on a network; `Network.host` makes it. address: its IPv4 address."""

    def __init__(self, network: Network, number: int) -> None:
        self.name = f"host{number}"
        self.address = f"{SUBNET}.{number}"
        self.port = f"port{number}"
        self._network = network
        self._started: list[HostProcess] = []
        self._relay: HostProcess | None = None
        self.boot()

    def boot(self) -> None:
        """Begin, at first or after `kill`, with nothing running and empty private folders."""
        switch = self._network.switch
        self._inside = _Namespaces(self.name, self._network.etc)
        veth = f"link add eth0 netns {self._inside.init} type veth peer name {self.port}"
        switch.ip(*veth.split())
        switch.ip(*f"link set {self.port} master bridge up".split())
        # The same after each boot, as a machine's.
        self._inside.ip(*f"link set eth0 address 02:00:00:00:00:0{self.port[-1]}".split())
        self._inside.ip(*f"address add {self.address}/24 dev eth0".split())
        self._inside.ip(*"link set eth0 up".split())
        # Programs ask which address leads out of the host; nothing answers out there.
        self._inside.ip(*"route add default dev eth0".split())

    @property
    def prefix(self) -> tuple[str, ...]:
        """What runs a command on this host."""
        return self._inside.prefix

    def popen(self, command: Sequence[str | Path], **options: Any) -> HostProcess:
        """Start a command here. options: those of `subprocess.Popen`."""
        options = {"start_new_session": True, "stdin": subprocess.DEVNULL, **options}
        process = HostProcess([*self.prefix, *map(str, command)], **options)
        self._started.append(process)
        return process

    def run(self, command: Sequence[str | Path], **options: Any) -> str:
        """The output of a command that ends here.
        Raises: AssertionError with its last words if it fails."""
        options = {"timeout": 60, **options}
        done = subprocess.run(
            [*self.prefix, *map(str, command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            **options,
        )
        assert done.returncode == 0, f"{command} on {self.name}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def forwarded(self, port: int) -> Iterator[int]:
        """A port of the machine's loopback that leads to `port` of this host's address, as its own
        processes reach it."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            network = os.open(f"/proc/{self._inside.init}/ns/net", os.O_RDONLY)
            loop = asyncio.new_event_loop()
            arguments = (loop, network, listener, (self.address, port))
            thread = threading.Thread(target=_forward, args=arguments, daemon=True)
            thread.start()
            try:
                yield listener.getsockname()[1]
            finally:
                loop.call_soon_threadsafe(loop.stop)
                thread.join(_WAIT_S)
                os.close(network)

    def processes(self) -> list[psutil.Process]:
        """All processes of this host, by their ids outside of it."""
        return self._inside.processes()

    def cut(self) -> None:
        """Pull the cable: nothing reaches this host or leaves it."""
        self._network.switch.ip("link", "set", self.port, "down")

    def restore(self) -> None:
        self._network.switch.ip("link", "set", self.port, "up")

    def slow(self, delay_s: float, loss: float = 0.0) -> None:
        """Delay each packet, and lose this part of them, each way, until `fast`.

        As `tc qdisc add ... netem delay ... loss ...` does, which not every kernel has.
        """
        self.fast()
        switch = self._network.switch
        switch.ip(*f"link set {self.port} nomaster".split())
        switch.ip(*f"link add slow{self.port} type veth peer name {self.port}slow".split())
        switch.ip(*f"link set slow{self.port} up".split())
        switch.ip(*f"link set {self.port}slow master bridge up".split())
        carry = [sys.executable, "-S", str(_SLOW_LINK), self.port, f"slow{self.port}"]
        relay = HostProcess(
            [*switch.prefix, *carry, str(delay_s), str(loss)], stdout=subprocess.PIPE, text=True
        )
        self._relay = relay
        assert relay.stdout is not None
        assert relay.stdout.readline() == "ready\n", "the slow link did not start"

    def fast(self) -> None:
        """End what `slow` began."""
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait(_WAIT_S)
            self._relay = None
            self._network.switch.ip(*f"link delete slow{self.port}".split())
            self._network.switch.ip(*f"link set {self.port} master bridge".split())

    def freeze(self) -> None:
        """Stop every process; the kernel of this host still acknowledges what arrives.

        A host that hangs as a whole is one that is cut and frozen.
        """
        deadline = time.monotonic() + _WAIT_S
        while running := [p for p in self.processes() if not _stopped(p)]:
            assert time.monotonic() < deadline, f"{self.name} does not stop: {running}"
            for process in running:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()

    def thaw(self) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.resume()
        for started in self._started:
            with suppress(psutil.NoSuchProcess):  # `nsenter` stops with its child.
                psutil.Process(started.pid).resume()

    def kill(self) -> None:
        """Switch this host off: its peers hear nothing of it, as no connection is closed."""
        self.cut()
        self.end()

    def end(self) -> None:
        """End every process of this host; its connections are closed, as those of a host that shuts
        down."""
        if self._relay is not None:
            self.fast()
        # A stopped `nsenter` does not end with its child.
        self.thaw()
        self._inside.end()
        with suppress(subprocess.CalledProcessError):  # The kernel may have been faster.
            self._network.switch.ip("link", "delete", self.port)
        for process in self._started:
            process.wait(_WAIT_S)
        self._started.clear()


def _forward(
    loop: asyncio.AbstractEventLoop,
    network: int,
    listener: socket.socket,
    there: tuple[str, int],
) -> None:
    """In a thread of its own, which alone enters the network."""
    if ctypes.CDLL(None, use_errno=True).setns(network, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to_server = await asyncio.open_connection(*there)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, to_server[1]), pump(to_server[0], writer))

    loop.run_until_complete(asyncio.start_server(accepted, sock=listener))
    loop.run_forever()


def _stopped(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class Network:
    """A switch and its hosts. shared: a folder that all hosts see, and so does the machine."""

    def __init__(self) -> None:
        self.hosts: list[Host] = []
        # Outside of `/tmp`, which each host has its own of.
        self.shared = Path(tempfile.mkdtemp(prefix="hosts-", dir="/var/tmp"))
        self.etc = self.shared / "etc"
        self.etc.mkdir()
        names = [f"{SUBNET}.{n} host{n}" for n in range(1, MOST_HOSTS + 1)]
        (self.etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        # Refuses at once; a name server that cannot be reached takes ten seconds for each name.
        (self.etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        try:
            self.switch = _Namespaces("switch", self.etc)
            self.switch.ip(*"link add bridge type bridge".split())
            self.switch.ip(*"link set bridge up".split())
        except BaseException:
            self.end()
            raise

    def host(self) -> Host:
        """Another host, booted."""
        number = len(self.hosts) + 1
        assert number <= MOST_HOSTS
        self.hosts.append(Host(self, number))
        return self.hosts[-1]

    def end(self) -> None:
        """End all hosts and whatever runs on them."""
        with ExitStack() as everything:
            everything.callback(shutil.rmtree, self.shared, ignore_errors=True)
            if hasattr(self, "switch"):
                everything.callback(self.switch.end)
            for host in self.hosts:
                everything.callback(host.end)


@contextmanager
def network() -> Iterator[Network]:
    """A network without hosts; skips the test, with the reason, where none can be made."""
    if os.geteuid():
        pytest.skip("only root can make hosts of namespaces")
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"hosts are made with {', '.join(missing)}")
    for path in (Path(sys.prefix), Path(__file__)):
        if path.resolve().is_relative_to("/tmp"):
            pytest.skip(f"{path} is in /tmp, which hosts have their own of")
    try:
        made = Network()
    except NoHosts as reason:
        pytest.skip(str(reason))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no virtual network: {error.stderr.decode().strip()}")
    try:
        yield made
    finally:
        made.end()
