"""When KV of waiting conversations is saved, what bounds it, and what a late or failing device
leaves."""

import random
from array import array
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from pascal_sglang.config import PascalConfig
from pascal_sglang.engine import build
from pascal_sglang.engine.kv.copy_stream import CopyStream
from pascal_sglang.engine.kv.host_copies import EntryCopies
from pascal_sglang.engine.kv.tool_kv import LOOK_S, ToolKV
from pascal_sglang.engine.kv.transfers import Transfers
from pascal_sglang.engine.tp_ranks import least
from pascal_sglang.policy import tool_waits
from pascal_sglang.policy.kv_tier import Costs
from pascal_sglang.policy.prefix_namespace import Namespace
from pascal_sglang.policy.tool_waits import FIRST_KEEP_S
from pascal_sglang.support import COPIES, EVERYTHING, TOOL_KV, Level, Support

ENTRIES, CHUNK, ROOM = 400, 100, 250


class Group:
    def size(self):
        return 1


class Tree:
    """A prefix cache that has the first tokens of everything, and notes what is put into it."""

    def __init__(self):
        self.cached, self.inserted, self.matched = ENTRIES, [], []
        # Tokens that nobody holds, as the cache counts them.
        self.evictable = 0

    def swa_reprefill_tail_tokens(self, _):
        return 0

    def evictable_size(self):
        return self.evictable

    def match_prefix(self, params):
        self.matched.append(params.key.raw_token_ids())
        return SimpleNamespace(
            device_prefix_len=min(self.cached, len(params.key)), last_device_node="node"
        )

    def path_device_indices(self, _):
        return torch.arange(ENTRIES)

    def insert(self, params):
        self.inserted.append(params)


class Pool:
    """Its free entries are the last ones."""

    def __init__(self):
        self.tree, self.free, self.locks = Tree(), 300, 0

    def cached_prefix(self, _, limit):
        return SimpleNamespace(tokens=min(self.tree.cached, limit), node="node")

    def take(self, tokens):
        if tokens > self.free:
            return None
        self.free -= tokens
        return torch.arange(ENTRIES - tokens, ENTRIES, dtype=torch.int32)

    def give(self, locations):
        self.free += len(locations)

    def lock(self, node):
        self.locks += 1
        return node

    def unlock(self, _):
        self.locks -= 1

    def changed(self):
        pass


class Broken(CopyStream):
    """A device that fails from some copy on."""

    def __init__(self, sound):
        self.sound = sound

    def run(self, copy, locations, *, after_steps):
        self.sound -= 1
        if self.sound < 0:
            raise RuntimeError("the device is gone")
        copy()


class Noting(CopyStream):
    """Notes of each copy how many entries it has, and whether steps in flight come first."""

    def __init__(self):
        self.noted = []

    def run(self, copy, locations, *, after_steps):
        self.noted.append((len(locations), after_steps))
        copy()


class Done:
    """The event after which a copy is complete."""

    def __init__(self, device, copy):
        self.device, self.copy, self.error = device, copy, None

    def land(self):
        while self.copy is not None:
            self.device.land()

    def query(self):
        if self.error is not None:
            raise self.error
        return self.copy is None

    def synchronize(self):
        self.land()
        self.query()


class Late(CopyStream):
    """A device on which copies land in their order, and no earlier than `land` or a wait says. Of
    the copies, so many begin and so many land before all others fail."""

    deferred = True

    def __init__(self, begin=1000, land=1000):
        self.left, self.sound, self.later = begin, land, deque()
        # What steps wait for.
        self.held = []

    def run(self, copy, locations, *, after_steps):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("no memory, on purpose")
        self.later.append(Done(self, copy))
        return self.later[-1]

    def land(self):
        done = self.later.popleft()
        copy, done.copy = done.copy, None
        self.sound -= 1
        if self.sound < 0:
            done.error = RuntimeError("on purpose")
        else:
            copy()

    def hold_steps(self, done):
        self.held.append(done)

    def launch(self):
        """A step begins."""
        held, self.held = self.held, []
        for done in held:
            done.land()


class Request(SimpleNamespace):
    """No other one is the same, whatever it holds."""

    __eq__, __hash__ = object.__eq__, object.__hash__


def request(rid, prompt, output=()):
    return Request(
        rid=rid,
        origin_input_ids=array("q", prompt),
        output_ids=array("q", output),
        finished_len=None,
        extra_key=None,
        cache_salt=None,
        session=None,
        input_embeds=None,
        pascal_state=SimpleNamespace(internal=False, keeps_kv=True),
    )


class Kept:
    """A `ToolKV` around buffers and a cache of our own."""

    def __init__(self, stream=None, costs=None, *, lru=True, scheduler=None):
        self.buffers = [torch.rand(ENTRIES, 2), torch.rand(ENTRIES, 3)]
        self.before = [each.clone() for each in self.buffers]
        self.stream = stream or CopyStream()
        copies = EntryCopies(self.buffers, self.stream, pins=False)
        copies.reserve(ROOM)
        self.pool = Pool()
        scheduler = scheduler or SimpleNamespace(attn_tp_cpu_group=Group())
        vars(scheduler).update(
            chunked_prefill_size=CHUNK, max_total_num_tokens=ENTRIES, page_size=1
        )
        self.scheduler, self.transfers = scheduler, Transfers(scheduler)
        self.left, self.asked_s = set(), None
        self.kv = ToolKV(
            scheduler,
            self.pool,
            copies,
            self.transfers,
            costs or Costs(),
            lambda _: (True, self.asked_s),
            lambda req: req.rid not in self.left,
            lru=lru,
        )

    def step(self, now, spare):
        """A pass, at whose beginning the ranks meet."""
        self.transfers.heard(*least(self.scheduler, *self.transfers.progress()))
        self.kv.step(now, spare)

    def reply(self, number, tokens=80):
        prompt = range(1000 * number, 1000 * number + tokens)
        self.kv.ended([request(f"r{number}", prompt, [1, 2])])

    def next_turn(self, number, tokens=80, **more):
        prompt = [*range(1000 * number, 1000 * number + tokens), 1, 2, 3, 4]
        found = request(f"n{number}", prompt)
        vars(found).update(more)
        self.kv.arrived(found)
        return found

    @property
    def saved(self):
        """Those of which something is saved, or on its way."""
        return [each.ids[0] // 1000 for each in self.kv.waits if each.begun]


def test_nothing_is_copied_with_memory_to_spare_and_the_oldest_first_under_pressure():
    kept = Kept()
    for number in (1, 2, 3):
        kept.reply(number)
    kept.step(1.0, CHUNK)
    assert (kept.saved, kept.kv.kept_tokens) == ([], 0)
    kept.step(1.1, CHUNK - 1)
    assert kept.saved == [1, 2]
    assert [each.begun for each in kept.kv.waits] == [81, CHUNK - 81, 0], "what a step may evict"
    kept.step(1.2, CHUNK - 1)
    assert [each.begun for each in kept.kv.waits] == [81, 81, 38]
    kept.step(1.3, CHUNK - 1)
    assert kept.kv.kept_tokens == 3 * 81
    kept.reply(4)
    kept.step(1.4, 0)
    assert (kept.kv.counts["saved"], kept.kv.counts["saved_tokens"]) == (3, 3 * 81)
    assert kept.saved == [1, 2, 3], "there is no room"
    assert kept.kv.describe()["host_tokens"] <= ROOM
    kept.step(1.4 + FIRST_KEEP_S, 0)
    assert kept.kv.counts["expired"] == 4
    assert kept.kv.kept_tokens == 0
    assert kept.kv.copies.room == ROOM


def test_a_full_pool_is_no_pressure_while_the_cache_has_enough_else_to_evict():
    """It evicts what has not been used for longest: what waits is used again and again."""
    kept = Kept()
    tree = kept.pool.tree
    kept.reply(1)
    kept.reply(2)
    # What waits, and one token more than a step may evict.
    tree.evictable = 2 * 81 + CHUNK
    kept.step(1.0, 0)
    assert kept.saved == []
    assert len(tree.matched) == 2, "used"
    kept.step(1.1, 0)
    assert len(tree.matched) == 2, "not in every pass"
    kept.step(1.0 + LOOK_S, 0)
    assert len(tree.matched) == 4
    tree.evictable += 50
    kept.kv.ended([request("other", range(51), [1])])
    kept.kv._ended.clear()
    kept.step(1.1 + LOOK_S, 0)
    assert kept.saved == []
    assert len(tree.matched) == 6, "what has ended since would have been evicted behind it"
    tree.evictable = 2 * 81 + CHUNK - 1
    kept.step(1.2 + LOOK_S, 0)
    assert kept.saved == [1, 2]


def test_a_cache_that_evicts_by_something_else_gives_no_such_time():
    kept = Kept(lru=False)
    kept.reply(1)
    kept.pool.tree.evictable = ENTRIES
    kept.step(1.0, CHUNK)
    assert (kept.saved, kept.pool.tree.matched) == ([], [])
    kept.step(1.1, CHUNK - 1)
    assert kept.saved == [1]


def test_what_several_begin_with_is_not_counted_twice():
    kept = Kept()
    for number in range(3):
        kept.kv.ended([request(f"r{number}", [*range(50), number], [1, 2])])
    kept.pool.tree.evictable = 50 + 3 * 2 + CHUNK
    kept.step(1.0, 0)
    assert kept.saved == []
    kept.pool.tree.evictable -= 1
    kept.step(1.1, 0)
    assert [each.begun for each in kept.kv.waits] == [52, CHUNK - 52, 0]


def test_the_entry_of_the_last_token_is_not_read_and_a_step_in_flight_is_waited_for():
    """Under overlap the step behind a stop token has begun, and the cache has its entry already."""
    kept = Kept(Noting())
    kept.reply(1)
    kept.step(1.0, 0)
    assert all(ids == array("q", [*range(1000, 1080), 1]) for ids in kept.pool.tree.matched)
    assert kept.stream.noted == [(81, True)]
    kept.reply(2)
    kept.step(1.1, CHUNK)
    kept.step(1.2, 0)
    assert kept.stream.noted[1:] == [(81, False)], "nobody ended since the last pass"


def test_a_save_that_is_half_done_is_gone_on_with_and_is_what_comes_back():
    kept = Kept()
    kept.reply(1, tokens=150)
    kept.step(1.0, 0)
    assert [each.begun for each in kept.kv.waits] == [CHUNK]
    kept.pool.tree.cached = 30
    kept.step(1.1, 0)
    assert [each.begun for each in kept.kv.waits] == [CHUNK], "the device has no more"
    req = kept.next_turn(1, tokens=150)
    kept.step(1.2, 0)
    kept.kv.bring_back(req)
    (put,) = kept.pool.tree.inserted
    assert (len(put.key), put.prev_prefix_len) == (CHUNK, 30)
    assert torch.equal(kept.buffers[0][put.value[30:]], kept.before[0][30:CHUNK])
    assert (kept.kv.kept_tokens, kept.kv.copies.room) == (0, ROOM)


@pytest.mark.parametrize("step", ["take", "insert"])
def test_an_error_on_the_way_back_leaves_no_lock(step, monkeypatch):
    kept = Kept()
    kept.reply(1)
    kept.step(1.0, 0)
    kept.pool.tree.cached = 30
    req = kept.next_turn(1)
    kept.step(2.0, 0)

    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(kept.pool if step == "take" else kept.pool.tree, step, fail)
    with pytest.raises(RuntimeError, match="no"):
        kept.kv.bring_back(req)
    assert (kept.pool.locks, kept.kv.kept_tokens, len(kept.kv.waits)) == (0, 0, 0)


def test_an_error_behind_a_copy_gives_its_entries_back(monkeypatch):
    kept = Kept()
    kept.reply(1)
    kept.step(1.0, 0)
    kept.pool.tree.cached = 30
    req = kept.next_turn(1)
    kept.step(2.0, 0)
    monkeypatch.delattr(Tree, "path_device_indices")
    with pytest.raises(AttributeError):
        kept.kv.bring_back(req)
    assert (kept.pool.free, kept.pool.locks) == (300, 0)


def test_a_turn_that_has_left_holds_nothing_and_one_with_its_id_gets_nothing_of_it():
    kept = Kept()
    kept.reply(1)
    kept.step(1.0, 0)
    kept.next_turn(1)
    kept.step(2.0, 0)
    other = request("n1", range(70))
    other.extra_key = "another"
    kept.kv.bring_back(other)
    assert kept.pool.tree.inserted == []
    assert len(kept.kv.waits) == 1
    kept.left.add("n1")
    kept.step(1.0 + FIRST_KEEP_S, 0)
    assert (kept.kv.counts["expired"], kept.kv.kept_tokens, len(kept.kv.waits)) == (1, 0, 0)


@pytest.mark.parametrize("device", [CopyStream(), Late()], ids=["at once", "late"])
def test_what_goes_on_elsewhere_is_let_go_and_counted_once(device):
    kept = Kept(device)
    kept.reply(1)
    kept.step(1.0, 0)
    prompt = array("q", [*range(1000, 1080), 1, 2, 3, 4])
    assert kept.kv.kept_tokens == 81
    for namespace in (("a", None), (None, None), (None, None)):
        kept.kv.elsewhere(prompt, Namespace(*namespace))
        kept.step(2.0, 0)
        assert kept.kv.counts["elsewhere"] == (namespace[0] is None)
    assert (kept.kv.kept_tokens, kept.kv.copies.room, len(kept.kv.waits)) == (0, ROOM, 0)
    kept.reply(2)
    kept.step(3.0, 0)
    kept.step(3.0 + FIRST_KEEP_S, 0)
    kept.kv.elsewhere(array("q", [*range(2000, 2080), 1]), Namespace())
    kept.step(3.1 + FIRST_KEEP_S, 0)
    assert (kept.kv.counts["expired"], kept.kv.counts["elsewhere"]) == (1, 1)
    assert len(kept.kv.waits) == 0


def test_a_turn_that_migrates_before_it_starts_takes_nothing_along():
    kept = Kept()
    kept.reply(1)
    kept.step(1.0, 0)
    req = kept.next_turn(1)
    kept.step(2.0, 0)
    kept.kv.left(req)
    assert (kept.kv.counts["elsewhere"], len(kept.kv.waits), kept.kv.kept_tokens) == (1, 0, 0)


def test_sessions_and_requests_that_have_begun_go_on_with_nothing():
    kept = Kept()
    kept.reply(1)
    kept.step(1.0, 0)
    for more in ({"session": SimpleNamespace(streaming=True)}, {"output_ids": array("q", [1])}):
        req = kept.next_turn(1, **more)
        kept.step(2.0, 0)
        kept.kv.bring_back(req)
    assert len(kept.kv.waits) == 1


def test_those_forgotten_are_counted(monkeypatch):
    monkeypatch.setattr(tool_waits, "MOST_CONVERSATIONS", 2)
    kept = Kept()
    for number in range(3):
        kept.reply(number)
        kept.step(1.0, 0)
    assert kept.kv.counts["forgotten"] == 1
    assert kept.saved == [1, 2]
    assert kept.kv.kept_tokens == 2 * 81


def test_the_next_turn_gets_back_what_the_device_has_lost_byte_for_byte():
    kept = Kept()
    kept.reply(1)
    kept.step(1.0, 0)
    kept.pool.tree.cached = 30
    req = kept.next_turn(1)
    kept.step(2.0, 0)
    kept.kv.bring_back(req)
    (put,) = kept.pool.tree.inserted
    assert (len(put.key), put.prev_prefix_len) == (81, 30)
    assert put.key.raw_token_ids() == req.origin_input_ids[:81]
    assert put.value[:30].tolist() == list(range(30))
    for buffer, before in zip(kept.buffers, kept.before, strict=True):
        assert torch.equal(buffer[put.value[30:]], before[30:81])
    assert dict(kept.kv.counts) == {
        **{"saved": 1, "saved_tokens": 81, "copied": 1, "copied_tokens": 51}
    }
    assert (kept.kv.kept_tokens, len(kept.kv.waits), kept.pool.locks) == (0, 0, 0)
    kept.kv.bring_back(req)
    assert len(kept.pool.tree.inserted) == 1, "once"


@pytest.mark.parametrize(
    ("cached", "spare", "outcome"),
    [(82, 0, "resident"), (81, CHUNK, "resident"), (0, CHUNK, "lost"), (30, CHUNK, "lost")],
)
def test_what_the_device_still_has_is_not_copied_and_what_nobody_has_is_lost(
    cached, spare, outcome
):
    """With memory to spare there is no copy."""
    kept = Kept()
    kept.reply(1)
    kept.step(1.0, spare)
    kept.pool.tree.cached = cached
    req = kept.next_turn(1)
    kept.step(2.0, CHUNK)
    kept.kv.bring_back(req)
    assert kept.kv.counts[outcome] == 1
    assert kept.pool.tree.inserted == []


def test_a_copy_that_takes_longer_than_a_prefill_is_left_out():
    kept = Kept(costs=Costs(copy_s=1.0, prefill_token_s=0.001))
    kept.reply(1)
    kept.step(1.0, 0)
    kept.pool.tree.cached = 0
    req = kept.next_turn(1)
    kept.step(2.0, 0)
    kept.kv.bring_back(req)
    assert (kept.kv.counts["lost"], kept.kv.kept_tokens) == (1, 0)


@pytest.mark.parametrize("sound", [0, 1])
def test_a_device_that_fails_leaves_a_prefill_and_no_entry_behind(sound):
    """On the way out, or on the way back."""
    kept = Kept(Broken(sound))
    kept.reply(1)
    kept.step(1.0, 0)
    kept.pool.tree.cached = 10
    req = kept.next_turn(1)
    kept.step(2.0, 0)
    kept.kv.bring_back(req)
    assert (kept.kv.counts["copy_failed"], kept.kv.counts["lost"]) == (1, 1)
    assert (kept.pool.free, kept.pool.locks, kept.pool.tree.inserted) == (300, 0, [])
    assert (kept.kv.kept_tokens, kept.kv.copies.room) == (0, ROOM)


def saving(device, **more):
    """A conversation of which a copy is under way."""
    kept = Kept(device, **more)
    kept.reply(1)
    kept.step(1.0, 0)
    assert (kept.saved, len(device.later)) == ([1], 1)
    return kept


def test_nobody_waits_for_a_copy_that_is_late():
    kept = saving(device := Late())
    kept.step(1.1, 0)
    assert (len(device.later), kept.kv.counts["saved"]) == (1, 0)
    assert not kept.transfers.is_empty
    device.land()
    kept.step(1.2, 0)
    assert (kept.kv.counts["saved"], kept.transfers.is_empty) == (1, True)


@pytest.mark.parametrize(
    ("cached", "outcome", "left"), [(81, "resident", 1), (30, "copied", 0)], ids=["there", "lost"]
)
def test_a_turn_before_its_conversation_is_saved_waits_only_for_what_the_device_has_lost(
    cached, outcome, left
):
    kept = saving(device := Late())
    kept.pool.tree.cached = cached
    req = kept.next_turn(1)
    kept.step(2.0, CHUNK)
    kept.kv.bring_back(req)
    assert kept.kv.counts[outcome] == 1
    assert sum(done.copy.func.__name__ == "_copy_out" for done in device.later) == left
    while device.later:
        device.land()
    kept.step(2.1, CHUNK)
    for put in kept.pool.tree.inserted:
        assert torch.equal(kept.buffers[0][put.value[30:]], kept.before[0][30:81])
    assert (kept.kv.copies.room, kept.transfers.is_empty) == (ROOM, True)


def test_a_step_waits_for_a_copy_only_once_what_it_copies_has_been_evicted():
    kept = saving(device := Late())
    kept.kv.hold_steps()
    assert device.held == [], "nobody writes there"
    kept.pool.tree.cached = 50
    kept.kv.hold_steps()
    kept.kv.hold_steps()
    assert device.held == [*device.later], "once"
    device.launch()
    kept.step(1.1, 0)
    assert kept.kv.counts["saved"] == 1


def test_what_is_evicted_for_a_turn_that_comes_back_is_seen_before_the_cache_changes_again():
    kept = saving(device := Late())
    device.land()
    kept.reply(2)
    kept.step(1.1, 0)
    kept.pool.tree.cached = 30
    req = kept.next_turn(1)
    kept.step(2.0, CHUNK)
    (save,) = device.later
    kept.kv.bring_back(req)
    assert device.held == [save, device.later[-1]], "and what comes back"


@pytest.mark.parametrize("way", ["drop", "forget", "expire"])
def test_what_is_let_go_while_it_is_being_saved_changes_nothing_that_comes_after(way):
    """Its memory is the next one's at once, whose copy comes after."""
    kept = saving(device := Late())
    if way == "drop":
        kept.kv.drop()
    elif way == "forget":
        kept.next_turn(1)
        kept.step(1.1, CHUNK)
        kept.kv.forget(lambda rid: rid == "n1")
    else:
        kept.step(1.0 + FIRST_KEEP_S, CHUNK)
    assert (kept.kv.kept_tokens, kept.kv.copies.room) == (0, ROOM)
    kept.reply(2)
    kept.step(70.0, 0)
    assert kept.saved == [2]
    device.land()
    kept.step(70.1, 0)
    assert kept.kv.counts["saved"] == 0
    device.land()
    kept.step(70.2, 0)
    assert (kept.kv.counts["saved"], kept.kv.kept_tokens) == (1, 81)


@pytest.mark.parametrize("fails", [{"begin": 1}, {"land": 1}], ids=["begin", "land"])
def test_a_part_that_fails_takes_its_conversation_along_and_no_other(fails):
    kept = Kept(device := Late(**fails))
    kept.reply(1, tokens=150)
    kept.step(1.0, 0)
    kept.step(1.1, 0)
    assert [each.begun for each in kept.kv.waits] == [151]
    while device.later:
        device.land()
    device.left = device.sound = 1000
    kept.reply(2)
    kept.step(1.2, 0)
    assert (kept.kv.counts["copy_failed"], kept.saved) == (1, [2])
    device.land()
    kept.step(1.3, 0)
    assert (kept.kv.kept_tokens, kept.kv.copies.room) == (81, ROOM - 81)
    assert kept.kv.counts["saved"] == 2, "of the first, a part was there"


class Unsure(Late):
    """One copy in ten fails, when it begins or when it lands."""

    def __init__(self, dice):
        super().__init__()
        self.dice = dice

    def run(self, copy, locations, *, after_steps):
        self.left = self.dice.random() > 0.05
        return super().run(copy, locations, after_steps=after_steps)

    def land(self):
        self.sound = self.dice.random() > 0.05
        super().land()


@pytest.mark.parametrize("seed", range(12))
def test_two_ranks_with_devices_of_their_own_do_the_same(both, seed):
    """Whatever fails or is late on one of them; what comes back is what was there. What the cache
    does not have any more, the next step writes."""

    def work(rank, scheduler):
        dice, own = random.Random(seed), random.Random(100 + 2 * seed + rank)
        kept = Kept(device := Unsure(own), scheduler=scheduler)
        replies, said = [], []
        for number in range(150):
            if dice.random() < 0.5:
                replies.append((number, dice.randint(20, 120)))
                kept.reply(*replies[-1])
            turn = None
            if replies and dice.random() < 0.5:
                turn = kept.next_turn(*replies.pop(dice.randrange(len(replies))))
            while device.later and own.random() < 0.5:
                device.land()
            cached = kept.pool.tree.cached = dice.choice([0, 30, 60, ENTRIES])
            for buffer, before in zip(kept.buffers, kept.before, strict=True):
                buffer[:cached] = before[:cached]
            kept.pool.free = 150
            kept.step(1.0 + number, 0)
            if turn is not None and dice.random() < 0.8:
                kept.kv.bring_back(turn)
                assert_right(kept, device)
            if dice.random() < 0.03:
                kept.kv.drop()
            kept.pool.tree.cached = evicted = dice.choice([cached, cached // 2])
            kept.kv.hold_steps()
            device.launch()
            for buffer in kept.buffers:
                buffer[evicted : ENTRIES - 150] = -1
            said.append((kept.kv.copies.room, kept.kv.kept_tokens, dict(kept.kv.counts)))
        kept.transfers.finish_all()
        kept.kv.drop()
        assert (kept.kv.copies.room, kept.pool.locks) == (ROOM, 0)
        return said

    def assert_right(kept, device):
        if not kept.pool.tree.inserted:
            return
        put = kept.pool.tree.inserted.pop()
        loaded = [done for done in device.later if done.copy.func.__name__ == "_copy_in"]
        while device.later:
            device.land()
        if any(done.error for done in loaded):
            return  # A device that loses what has begun takes the server along.
        begin = put.prev_prefix_len
        for buffer, before in zip(kept.buffers, kept.before, strict=True):
            assert torch.equal(buffer[put.value[begin:]], before[begin : len(put.key)])

    first, second = both(work)
    assert first == second
    counts = first[-1][2]
    assert min(counts[name] for name in ("saved", "copied", "copy_failed", "lost")) > 0, counts


def test_without_memory_on_the_device_it_is_prefilled():
    kept = Kept()
    kept.reply(1)
    kept.step(1.0, 0)
    kept.pool.tree.cached, kept.pool.free = 10, 5
    req = kept.next_turn(1)
    kept.step(2.0, 0)
    kept.kv.bring_back(req)
    assert (kept.kv.counts["lost"], kept.pool.locks) == (1, 0)


def test_all_is_dropped_and_an_abort_drops_what_it_names():
    kept = Kept()
    for number in (1, 2):
        kept.reply(number)
        kept.step(1.0, 0)
    kept.next_turn(1)
    kept.next_turn(2)
    kept.kv.forget(lambda rid: rid == "n2")
    kept.step(1.2, 0)
    assert kept.saved == [1, 2], "it was aborted before it was looked at"
    kept.kv.forget(lambda rid: rid == "n1")
    assert kept.saved == [2]
    kept.next_turn(2)
    kept.reply(4)
    kept.kv.drop()
    kept.step(1.3, 0)
    assert (len(kept.kv.waits), kept.kv.kept_tokens) == (0, 0)
    assert kept.kv.copies.room == ROOM


def test_only_requests_whose_kv_is_plain_and_their_own_are_kept():
    kept = Kept()
    others = [request(f"x{number}", range(50), [1]) for number in range(4)]
    others[0].pascal_state.internal = True
    others[1].pascal_state.keeps_kv = False
    others[2].session = SimpleNamespace(streaming=False)
    others[3].input_embeds = [[0.0]]
    kept.kv.ended(others)
    kept.step(1.0, 0)
    assert len(kept.kv.waits) == 0


PLAIN = SimpleNamespace(copies=True, buffers=[], beside=lambda: "memory")
SOUND = {
    "tree_cache": SimpleNamespace(disable=False, cache_controller=None),
    "is_hybrid_swa": False,
    "is_hybrid_ssm": False,
    "spec_algorithm": SpeculativeAlgorithm.NONE,
}
FEATURES = {
    "--disable-radix-cache": {"tree_cache": SimpleNamespace(disable=True, cache_controller=None)},
    "--enable-hierarchical-cache": {
        "tree_cache": SimpleNamespace(disable=False, cache_controller="one")
    },
    "sliding windows": {"is_hybrid_swa": True},
    "recurrent states": {"is_hybrid_ssm": True},
    "speculative decoding": {"spec_algorithm": SpeculativeAlgorithm.EAGLE},
}


def test_every_feature_that_keeps_it_off_is_tried():
    assert FEATURES.keys() == {row.name for row in TOOL_KV}


@pytest.mark.parametrize(
    ("name", "scheduler", "copies", "support"),
    [
        *((name, more, PLAIN, EVERYTHING) for name, more in FEATURES.items()),
        (COPIES[0].name, {}, SimpleNamespace(copies=False, buffers=None), EVERYTHING),
        (COPIES[1].name, {}, SimpleNamespace(copies=True, buffers=None), EVERYTHING),
        ("--pp-size above 1", {}, PLAIN, Support(Level.ORDER, ("--pp-size above 1",))),
    ],
)
def test_a_feature_with_which_it_is_not_done_keeps_it_off_and_is_named(
    name, scheduler, copies, support, monkeypatch, caplog
):
    monkeypatch.setattr(build, "speaks", lambda: True)
    around = SimpleNamespace(**{**SOUND, **scheduler})
    config = PascalConfig(tool_kv=0.5)
    assert build.memory_for_tools(around, config, copies, support) is None
    assert f"--pascal-tool-kv has no effect, because of {name}" in caplog.text


def test_plain_kv_is_kept_where_it_is_asked_for():
    plain = SimpleNamespace(**SOUND)
    config = PascalConfig(tool_kv=0.5)
    assert build.memory_for_tools(plain, config, PLAIN, EVERYTHING) == "memory"
    assert build.memory_for_tools(plain, PascalConfig(), PLAIN, EVERYTHING) is None
