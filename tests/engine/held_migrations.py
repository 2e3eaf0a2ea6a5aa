"""`sglang` whose moves stand still where a test wants them to, for as long as it wants.

The folder in `HOLD_FOLDER` says how, by the names of its files. `hold-KIND`: messages of that kind
and all that their sender says after them are not read until the file goes; `held-KIND` appears with
the first one. `lose-KIND`: the next one is lost, and the file with it. `hold-still`: a request that
leaves the batch is not said to stand still yet. `stop-at`: it is copied, and leaves, once it has so
many KV entries. `later`: everybody's patience with the other side is over. `impatient`: what has no
answer is said again in every pass. `slow`: movers that have `AT_ONCE` tokens go on with one token
per `PASS_S`, so that none ends while a test looks around, however fast or slow the machine is.
Worker processes import the main module, so this holds in all of them.
"""

import os
import sys
import time
from pathlib import Path

from pascal_sglang.cluster.codec import unpack
from pascal_sglang.cluster.control_channel import ControlReceiver
from pascal_sglang.cluster.migration_source import MigrationSource, SourceState, Terms
from pascal_sglang.cluster.migration_target import MigrationTarget
from pascal_sglang.engine.migration.manager import Migrations

FOLDER = Path(os.environ["HOLD_FOLDER"])
LATER_S = 1000.0
GROWTH = 2000
AT_ONCE, PASS_S = 30, 0.1
sound_open, sound_receive = ControlReceiver.__init__, ControlReceiver.receive
sound_copy, sound_tail, ticks = (
    MigrationSource.copy,
    MigrationSource.tail,
    (MigrationSource.tick, MigrationTarget.tick),
)
sound_due, sound_step = MigrationSource._is_due, Migrations.step


def told(name):
    return (FOLDER / name).exists()


def stop_at():
    return int((FOLDER / "stop-at").read_text()) if told("stop-at") else 0


def receive(control_receiver):
    control_receiver.held += sound_receive(control_receiver)
    found, control_receiver.held, held, slow = [], [], control_receiver.held, set()
    for data in held:
        sender, message = unpack(data, control_receiver.instances)
        kind = type(message).__name__
        if told(f"lose-{kind}"):
            (FOLDER / f"lose-{kind}").unlink(missing_ok=True)
        elif told(f"hold-{kind}") or (hasattr(message, "migration") and sender in slow):
            slow.add(sender)
            control_receiver.held.append(data)
            (FOLDER / f"held-{kind}").touch()
        else:
            found.append(data)
    return found


def open_receiver(control_receiver, folder, name, instances):
    sound_open(control_receiver, folder, name, instances)
    control_receiver.held = []
    if name != "controller":
        from pascal_sglang.cluster import migration_pace

        # Nobody outgrows what was reserved for it, however long it is held.
        migration_pace.GROWTH = GROWTH


def copy(source, kv_tokens, *, still, before=0, room=True):
    if source.state is SourceState.COPYING and kv_tokens < stop_at():
        return []
    if still and told("hold-still"):
        (FOLDER / "held-still").touch()
        still = False
    return sound_copy(source, kv_tokens, still=still, before=before, room=room)


def tail(source):
    return source.slot_tokens if told("stop-at") else sound_tail.fget(source)


def is_due(source, now, at_most):
    return told("impatient") or sound_due(source, now, at_most)


def late(tick):
    return lambda side, now: tick(side, now + LATER_S if told("later") else now)


def step(migrations, running):
    movers = [req for req in running.reqs if req.rid.startswith("mover")]
    if any(len(req.output_ids) > AT_ONCE for req in movers) and told("slow"):
        time.sleep(PASS_S)
    sound_step(migrations, running)


ControlReceiver.__init__, ControlReceiver.receive = open_receiver, receive
MigrationSource.copy, MigrationSource.tail = copy, property(tail)
MigrationSource.tick, MigrationTarget.tick, MigrationSource._is_due = *map(late, ticks), is_due
Migrations.step = step
# A test looks around while it holds something.
Terms.__init__.__kwdefaults__["patience_s"] = Terms.__init__.__kwdefaults__["repeat_at_most_s"] = (
    60.0
)

if __name__ == "__main__":
    from sglang.cli.main import main

    sys.exit(main())
