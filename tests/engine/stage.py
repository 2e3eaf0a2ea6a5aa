"""A stage for one move: two instances at rest, a neighbour on each, and a request whose move is
held where `held_migrations` is told to hold it."""

import http.client
import json
import socket
import threading
import time
import uuid

from tests.engine.test_migration import at_rest, nothing_left, total
from tests.requests import generate

PROMPT = "A question whose answer moves when its thinking is over: "
THINK, LONG = 6, 300

# How to hold a move in a state: what is held, and the states of source and target meanwhile; None
# where no move is under way, or no longer.
STATES = {
    "asking": ("ReserveRequest", "asking", None),
    "asking, granted": ("ReserveGranted", "asking", "receiving"),
    "copying, not read": ("KVChunk", "copying", "receiving"),
    "copying, not confirmed": ("ChunkAck", "copying", "receiving"),
    "stopping": ("still", "stopping", "receiving"),
    "handed": ("Handover", "handed", "receiving"),
    "owned": ("CommitAck", "handed", None),
}


class Hold:
    """The folder that `held_migrations` looks into."""

    def __init__(self, folder):
        self.folder = folder

    def say(self, name, text=""):
        (self.folder / name).write_text(text)

    def wait_for(self, name, there=True):
        deadline = time.monotonic() + 60
        while (self.folder / name).exists() is not there:
            assert time.monotonic() < deadline, (name, there)
            time.sleep(0.005)

    def drop(self, name):
        (self.folder / name).unlink(missing_ok=True)

    def clear(self, but=""):
        for file in self.folder.iterdir():
            if file.name != but:
                file.unlink(missing_ok=True)


class Reader(threading.Thread):
    """Reads one stream, sees that it only grows and ends once, and can hang up."""

    def __init__(self, server, body):
        super().__init__(daemon=True)
        self.rid = body["rid"]
        self.ids, self.ends, self.error, self.meta = [], [], None, {}
        self.began = threading.Event()
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        self._connection.request(
            "POST",
            "/generate",
            json.dumps({**body, "stream": True}),
            {"Content-Type": "application/json"},
        )
        self._socket = self._connection.sock
        self._hung_up = False
        self.start()

    def run(self):
        try:
            for line in self._connection.getresponse():
                if line.startswith(b"data: {"):
                    self._take(json.loads(line[6:]))
        except (OSError, http.client.HTTPException) as error:
            if not self._hung_up:
                self.error = error

    def _take(self, event):
        if event["output_ids"][: len(self.ids)] != self.ids:
            self.error = "a stream took back a token"
        self.ids, self.meta = event["output_ids"], event["meta_info"]
        self.began.set()
        if event["meta_info"]["finish_reason"]:
            self.ends.append(event["meta_info"]["finish_reason"]["type"])

    def hang_up(self):
        self._hung_up = True
        self._socket.shutdown(socket.SHUT_RDWR)

    def end(self):
        """Its tokens and how it ended, in a list; empty after hanging up."""
        seen = -1
        while self.is_alive():
            assert len(self.ids) > seen, "no token for a minute"
            seen = len(self.ids)
            self.join(60)
        assert self.error is None
        return self.ids, self.ends


def coordinator(**more):
    body = generate(PROMPT, THINK, LONG, rid=f"mover-{uuid.uuid4().hex}", routed_dp_rank=0)
    body["sampling_params"].update(more)
    return body


def neighbour(instance):
    """Somebody who does not think, and so does not move."""
    text = f"Neighbour on {instance}, who goes on as if nothing happened: "
    return generate(text, None, 150, rid=uuid.uuid4().hex, routed_dp_rank=instance)


class Scene:
    """The server at rest, with a neighbour on each instance; who was counted there before."""

    def __init__(self, server, hold, alone):
        self.server, self.hold, self.alone = server, hold, alone
        self.before = at_rest(server)
        # An instance may have said that it holds something after the last scene had been cleared.
        hold.clear()
        self.neighbours = [Reader(server, neighbour(i)) for i in (0, 1)]
        # Whoever has decoded has read the last letters about the move before: none is held for it.
        for reader in self.neighbours:
            reader.began.wait(60)
        self.movers = 0

    def start(self, **more):
        """A mover that is slow until this is over, or `hurry`."""
        self.movers += 1
        self.hold.say("slow")
        return Reader(self.server, coordinator(**more))

    def hurry(self):
        self.hold.drop("slow")

    def let_go(self):
        """What is held goes on; movers are still slow, so that their moves come to their ends."""
        self.hold.clear(but="slow")

    def states(self, rid):
        """Source's and target's state of a move under way; None without one."""
        return self.states_of_all([rid])[0]

    def states_of_all(self, rids):
        """The same of several moves, at one time."""
        instances = self.server.instances()
        out, into = (
            {m["rid"]: m["state"] for i in instances for m in i["migrations"][way]}
            for way in ("out", "in")
        )
        return [(out.get(rid), into.get(rid)) for rid in rids]

    def gained(self, way, outcome):
        return total(self.server.instances(), way, outcome) - total(self.before, way, outcome)

    def wait_for(self, way, outcome, count=1):
        deadline = time.monotonic() + 60
        while self.gained(way, outcome) < count:
            assert time.monotonic() < deadline, self.server.instances()
            time.sleep(0.02)

    def over(self):
        """Everything may go on: what is there at rest."""
        self.hold.clear()
        for instance, reader in enumerate(self.neighbours):
            assert reader.end() == (self.alone[instance], ["length"])
        after = at_rest(self.server)
        nothing_left(after)
        ended = [sum(sum(i["ended"].values()) for i in s) for s in (self.before, after)]
        assert ended[1] - ended[0] == self.movers + len(self.neighbours)
        assert all(i["migrations"]["rejected"] == {} for i in after)
        shown = self.server.get("/pascal/status")["controller"]
        assert (shown["rejected"], shown["dead"]) == ({}, [])


def held_in(scene, state, **more):
    """A mover whose move stands in that state."""
    what, source, target = STATES[state]
    scene.hold.say(f"hold-{what}")
    reader = scene.start(**more)
    scene.hold.wait_for(f"held-{what}")
    return reader, (source, target)
