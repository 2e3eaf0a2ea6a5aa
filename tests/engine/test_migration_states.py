"""What can happen to a request, in every state of its move, on running engines.

A move is held in one state (`held_migrations`), something happens to its request, and then the move
may go on. Whatever it was: the request ends once, with the tokens that it has without moves or the
beginning of them; the others do not notice; nothing is left under way or in memory.
"""

import sys
import time
import urllib.error
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine.load import abort
from tests.engine.stage import (
    LONG,
    PROMPT,
    STATES,
    THINK,
    Hold,
    Reader,
    Scene,
    coordinator,
    held_in,
    neighbour,
)
from tests.requests import generate

HELD = (sys.executable, str(Path(__file__).with_name("held_migrations.py")), "serve")
# Far enough that the move stands still by then.
ENDS_AT = 120

DECODING = [name for name in STATES if name not in ("stopping", "handed")]
ENDINGS = ("length", "stop string", "stop token")
SLOTS = 8


@pytest.fixture(scope="module")
def alone(stock_server):
    """What everybody gets without us: the mover, and the neighbour of each instance."""

    def ask(body):
        return stock_server.post("/generate", {**body, "routed_dp_rank": None})

    whole = ask(coordinator())
    return {
        "mover": whole["output_ids"],
        "text": whole["text"],
        0: ask(neighbour(0))["output_ids"],
        1: ask(neighbour(1))["output_ids"],
        "ask": ask,
    }


@pytest.fixture(scope="module")
def endings(alone):
    """Sampling parameters that end the mover around `ENDS_AT`, and what it gets with them."""
    ids, text = alone["mover"], alone["text"]
    begin = next(i for i in range(ENDS_AT, LONG) if text.index(text[i : i + 4]) == i)
    # Of all tokens the one that is new latest; most of them come soon.
    token = max(set(ids[: 2 * ENDS_AT]), key=ids.index)
    asked = {
        "length": {"max_new_tokens": ENDS_AT},
        "stop string": {"stop": [text[begin : begin + 4]]},
        "stop token": {"stop_token_ids": [token], "ignore_eos": False},
    }
    found = {}
    for name, params in asked.items():
        reply = alone["ask"](coordinator(**params))
        reason = "length" if name == "length" else "stop"
        assert reply["meta_info"]["finish_reason"]["type"] == reason, asked
        assert THINK + 40 < len(reply["output_ids"]) < LONG
        found[name] = (params, (reply["output_ids"], [reason]))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hold")


@pytest.fixture(scope="module")
def held(serve, folder):
    """Two instances; everybody moves when its thinking ends, and never again."""
    binding = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1", "HOLD_FOLDER": str(folder)}
    flags = ["--dp-size", "2", "--max-total-tokens", "3000"]
    with serve({"force_migration": 1e-12}, flags, HELD, **binding) as server:
        yield server


@pytest.fixture
def scene(held, folder, alone):
    hold = Hold(folder)
    made = Scene(held, hold, alone)
    yield made
    hold.clear()


@pytest.mark.parametrize("state", STATES)
def test_what_was_held_goes_on(state, scene):
    reader, states = held_in(scene, state)
    assert scene.states(reader.rid) == states
    scene.let_go()
    scene.wait_for("outgoing", "moved")
    scene.hurry()
    assert reader.end() == (scene.alone["mover"], ["length"])
    scene.over()
    assert scene.gained("outgoing", "moved") == scene.gained("incoming", "taken") == 1


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", ["abort", "hang up"])
def test_who_gives_up(how, state, scene):
    reader, states = held_in(scene, state)
    assert scene.states(reader.rid) == states
    if how == "abort":
        abort(scene.server, reader.rid)
    else:
        reader.hang_up()
    ids, ends = reader.end()
    # The move is held all the while: nothing of it is needed to end the request.
    assert scene.server.recent(reader.rid)["outcome"] == "aborted"
    assert ends == (["abort"] if how == "abort" else [])
    assert ids == scene.alone["mover"][: len(ids)]
    scene.over()
    moved = state == "owned"
    assert scene.gained("outgoing", "moved" if moved else "kept:aborted") == 1
    assert scene.gained("incoming", "taken") == moved


@pytest.mark.parametrize("state", DECODING)
@pytest.mark.parametrize("ending", ENDINGS)
def test_who_ends(ending, state, scene, endings):
    params, expected = endings[ending]
    reader, _ = held_in(scene, state, **params)
    scene.hurry()
    assert reader.end() == expected
    scene.over()
    moved = state == "owned"
    assert scene.gained("outgoing", "moved" if moved else "kept:ended") == 1
    assert scene.gained("incoming", "taken") == moved


@pytest.mark.parametrize("ending", ENDINGS)
def test_who_ends_around_the_stop(ending, scene, endings):
    """Told to leave the batch shortly before its end, at its end and after it: its last token may
    be under way when it leaves."""
    params, expected = endings[ending]
    last = len(PROMPT) + len(expected[0])
    for stop_at in range(last - 4, last + 1):
        scene.hold.say("stop-at", str(stop_at))
        reader = scene.start(**params)
        deadline = time.monotonic() + 60
        while scene.states(reader.rid) != ("copying", "receiving"):
            assert time.monotonic() < deadline, reader.ids
        scene.hurry()
        assert reader.end() == expected
    scene.over()
    ended = scene.gained("outgoing", "kept:ended")
    assert ended + scene.gained("outgoing", "moved") == scene.movers
    assert 0 < ended < scene.movers


def test_a_busy_target_refuses(scene):
    """As many as have slots come; one more stays. All ask before anybody is heard."""
    scene.hold.say("hold-ReserveRequest")
    readers = [scene.start(max_new_tokens=200) for _ in range(SLOTS + 1)]
    rids = [reader.rid for reader in readers]
    deadline = time.monotonic() + 60
    while set(found := scene.states_of_all(rids)) != {("asking", None)}:
        assert time.monotonic() < deadline, found
    scene.hold.say("hold-KVChunk")
    scene.hold.drop("hold-ReserveRequest")
    scene.wait_for("incoming", "busy")
    scene.let_go()
    scene.wait_for("outgoing", "moved", SLOTS)
    scene.hurry()
    for reader in readers:
        assert reader.end() == (scene.alone["mover"][:200], ["length"])
    scene.over()
    assert scene.gained("outgoing", "kept:busy") == 1
    assert scene.gained("outgoing", "moved") == SLOTS


def start_and_lose(scene, kind):
    """A mover of whose messages the first of that kind is lost."""
    scene.hold.say(f"lose-{kind}")
    reader = scene.start()
    scene.hold.wait_for(f"lose-{kind}", there=False)
    return reader


def assert_it_stays(scene, reader):
    """The source's patience ends: its request goes on there as if nothing had been asked."""
    scene.hold.say("later")
    scene.wait_for("outgoing", "kept:timeout")
    scene.hold.clear()
    assert reader.end() == (scene.alone["mover"], ["length"])
    scene.over()
    assert scene.gained("incoming", "taken") == 0


@pytest.mark.parametrize("lost", ["ReserveRequest", "ReserveGranted", "KVChunk"])
def test_a_lost_message_is_not_waited_for(lost, scene):
    assert_it_stays(scene, start_and_lose(scene, lost))


@pytest.mark.parametrize("lost", ["ChunkAck", "Handover", "CommitAck"])
def test_a_lost_word_is_said_again(lost, scene):
    """The next piece's word is that of the one before, too."""
    reader = start_and_lose(scene, lost)
    scene.wait_for("outgoing", "moved")
    scene.hurry()
    assert reader.end() == (scene.alone["mover"], ["length"])
    scene.over()
    assert scene.gained("outgoing", "moved") == 1


def test_a_lost_cancellation_is_not_waited_for(scene, endings):
    params, expected = endings["length"]
    reader, _ = held_in(scene, "copying, not confirmed", **params)
    scene.hold.say("lose-MigrationCancelled")
    scene.hurry()
    assert reader.end() == expected
    scene.hold.wait_for("lose-MigrationCancelled", there=False)
    assert scene.states(reader.rid) == (None, "receiving")
    scene.hold.say("later")
    scene.wait_for("incoming", "timeout")
    scene.over()
    assert scene.gained("outgoing", "kept:ended") == 1


@pytest.mark.parametrize("state", ["asking", "asking, granted", "copying, not read", "stopping"])
def test_a_slow_target_is_not_waited_for(state, scene):
    """The request goes on where it is, and what comes too late changes nothing."""
    reader, _ = held_in(scene, state)
    assert_it_stays(scene, reader)


@pytest.mark.parametrize("state", ["handed", "owned"])
def test_a_target_that_is_stopped_after_the_handover(state, scene):
    """The request ends with an error, and the target drops it once it hears."""
    what, _, _ = STATES[state]
    scene.hold.say(f"hold-{what}")
    scene.hold.say("slow")
    scene.movers += 1
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(scene.server.post, "/generate", coordinator())
        scene.hold.wait_for(f"held-{what}")
        scene.hold.say("impatient")
        with pytest.raises(urllib.error.HTTPError) as caught:
            reply.result()
    assert caught.value.code == 503
    assert "does not answer" in caught.value.read().decode()
    scene.hold.clear()
    scene.wait_for("outgoing", "kept:no answer")
    scene.wait_for("incoming", "revoked")
    scene.over()
    assert scene.gained("outgoing", "moved") == 0


def test_a_full_target_refuses(scene):
    # Beside it there is no room for a mover, whether the neighbour has ended or not.
    text = "much to read " * 203
    filler = generate(text, None, 340, rid=f"mover-{uuid.uuid4().hex}", routed_dp_rank=1)
    scene.movers += 1
    scene.hold.say("slow")
    filling = Reader(scene.server, filler)
    deadline = time.monotonic() + 60
    while not filling.ids:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    reader = scene.start()
    scene.wait_for("incoming", "full")
    assert not filling.ends
    scene.hurry()
    filling.hang_up()
    assert reader.end() == (scene.alone["mover"], ["length"])
    scene.over()
    assert scene.gained("outgoing", "kept:full") == 1
    assert scene.gained("incoming", "taken") == 0
