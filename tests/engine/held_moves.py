"""`sglang` whose moves stand still where a test wants them to, for as long as it wants.

The folder in `HOLD_FOLDER` says how, by the names of its files. `hold-KIND`: messages of that kind
and all that their sender says after them are not read until the file goes; `held-KIND` appears with
the first one. `lose-KIND`: the next one is lost, and the file with it. `hold-still`: a request that
leaves the batch is not said to stand still yet. `stop-at`: it is copied, and leaves, once it has so
many KV entries. `later`: everybody's patience with the other side is over. `impatient`: what has no
answer is said again in every pass. Worker processes import the main module, so this holds in all of
them.
"""

import os
import sys
from pathlib import Path

import orjson

from pascal_sglang.cluster.control_channel import ControlReceiver
from pascal_sglang.cluster.migration_source import Source, SourceState, Terms
from pascal_sglang.cluster.migration_target import Target

FOLDER = Path(os.environ["HOLD_FOLDER"])
LATER_S = 1000.0
GROWTH = 2000
sound_open, sound_letters = ControlReceiver.__init__, ControlReceiver.letters
sound_copy, sound_far, ticks = Source.copy, Source._far_enough, (Source.tick, Target.tick)
sound_due = Source._is_due


def told(name):
    return (FOLDER / name).exists()


def stop_at():
    return int((FOLDER / "stop-at").read_text()) if told("stop-at") else 0


def letters(box):
    box.held += sound_letters(box)
    found, box.held, held, slow = [], [], box.held, set()
    for letter in held:
        read = orjson.loads(letter)
        kind, sender = read["kind"], read["sender"]
        if told(f"lose-{kind}"):
            (FOLDER / f"lose-{kind}").unlink()
        elif told(f"hold-{kind}") or ("move" in read and sender in slow):
            slow.add(sender)
            box.held.append(letter)
            (FOLDER / f"held-{kind}").touch()
        else:
            found.append(letter)
    return found


def open_box(box, folder, name, instances):
    sound_open(box, folder, name, instances)
    box.held = []
    if name != "controller":
        from pascal_sglang.engine.migration import outgoing

        # Nobody outgrows what was reserved for it, however long it is held.
        outgoing.GROWTH = GROWTH


def copy(source, now, kv_tokens, *, still):
    if source.state is SourceState.COPYING and kv_tokens < stop_at():
        return []
    if still and told("hold-still"):
        (FOLDER / "held-still").touch()
        still = False
    return sound_copy(source, now, kv_tokens, still=still)


def far_enough(source, kv_tokens, left):
    return told("stop-at") or sound_far(source, kv_tokens, left)


def is_due(source, now, at_most):
    return told("impatient") or sound_due(source, now, at_most)


def late(tick):
    return lambda side, now: tick(side, now + LATER_S if told("later") else now)


ControlReceiver.__init__, ControlReceiver.letters = open_box, letters
Source.copy, Source._far_enough = copy, far_enough
Source.tick, Target.tick, Source._is_due = *map(late, ticks), is_due
# A test looks around while it holds something.
Terms.__init__.__kwdefaults__["patience_s"] = Terms.__init__.__kwdefaults__["repeat_at_most_s"] = (
    60.0
)

if __name__ == "__main__":
    from sglang.cli.main import main

    sys.exit(main())
