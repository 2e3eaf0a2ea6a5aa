"""Tries what a host that has no keys can try at a port, and says how far it got.

    python intruder.py HOST:PORT... [--others HOST:PORT...]

Prints one JSON object: for each port, what came of each attempt. Others are those of Ray and of
Mooncake, which speak other protocols than ours.
"""

from __future__ import annotations

import argparse
import http.client
import json
import pickle
import socket
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

WAIT_S = 1.5
# Of the services of Ray's processes: one that says what they know, or changes it.
CALLS = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "JobInfoGcsService/GetAllJobInfo",
    "InternalKVGcsService/InternalKVKeys",
    "NodeManagerService/GetSystemConfig",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "CoreWorkerService/GetCoreWorkerStats",
    "CoreWorkerService/PushTask",
    "CoreWorkerService/KillActor",
    "RayletDriver/ClusterInfo",
    "RayletDriver/KVList",
    "ReporterService/GetTraceback",
    "LogService/ListLogs",
)


def attempt(endpoint: str, kind: int, *, curve: bool) -> dict[str, Any]:
    """Shake hands, and send or read. connected: TCP took the connection. in: ZeroMQ did, and so
    messages would go through. sent, read: one did."""
    context = zmq.Context()
    one: zmq.Socket[bytes] = context.socket(kind)
    one.setsockopt(zmq.LINGER, 0)
    one.setsockopt(zmq.IMMEDIATE, 1)  # What is sent has a connection that was taken.
    if curve:
        public, private = zmq.curve_keypair()
        one.setsockopt(zmq.CURVE_PUBLICKEY, public)
        one.setsockopt(zmq.CURVE_SECRETKEY, private)
        one.setsockopt(zmq.CURVE_SERVERKEY, zmq.curve_keypair()[0])
    events = one.get_monitor_socket()
    one.connect(endpoint)
    seen = set()
    deadline = time.monotonic() + WAIT_S
    sent = read = False
    while time.monotonic() < deadline:
        if events.poll(50):
            seen.add(zmq.Event(recv_monitor_message(events)["event"]))
        try:
            if kind == zmq.PUSH:
                one.send(pickle.dumps("not a message of this server"), zmq.NOBLOCK)
                sent = True
            else:
                read = bool(one.recv(zmq.NOBLOCK)) or read
        except zmq.ZMQError:
            continue
    one.disable_monitor()
    events.close(linger=0)
    one.close(linger=0)
    context.destroy(linger=0)
    return {
        "connected": zmq.Event.CONNECTED in seen,
        "in": zmq.Event.HANDSHAKE_SUCCEEDED in seen,
        "sent": sent,
        "read": read,
    }


def knock(address: str) -> dict[str, Any]:
    """connected: TCP took the connection. calls: what Ray says to each that it does not refuse as
    unknown; `OK` is an answer. page: the status of its first page, where that is HTTP."""
    import grpc

    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), WAIT_S).close()
    except OSError:
        return {"connected": False}
    calls = {}
    with grpc.insecure_channel(address) as channel:
        for name in CALLS:
            try:
                channel.unary_unary(f"/ray.rpc.{name}")(b"", timeout=WAIT_S)
                calls[name] = "OK"
            except grpc.RpcError as error:
                calls[name] = error.code().name
    try:
        with urllib.request.urlopen(f"http://{address}/", timeout=WAIT_S) as reply:
            page = reply.status
    except urllib.error.HTTPError as error:
        page = error.code
    except (OSError, http.client.HTTPException):
        page = None
    known = {name: code for name, code in calls.items() if code != "UNIMPLEMENTED"}
    return {"connected": True, "calls": known, "page": page}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ours", nargs="*")
    parser.add_argument("--others", nargs="*", default=[])
    asked = parser.parse_args()

    def attempts(address: str) -> list[dict[str, Any]]:
        kinds = [(kind, curve) for kind in (zmq.PUSH, zmq.PULL) for curve in (False, True)]
        return [attempt(f"tcp://{address}", kind, curve=curve) for kind, curve in kinds]

    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(asked.ours, pool.map(attempts, asked.ours), strict=True))
        others = dict(zip(asked.others, pool.map(knock, asked.others), strict=True))
    json.dump(found | others, sys.stdout)


if __name__ == "__main__":
    main()
