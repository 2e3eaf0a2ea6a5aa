"""KV of conversations that wait for a tool, in host memory (`--pascal-tool-kv`).

SGLang leaves the KV of a reply in the prefix cache, which drops it when memory is short. Before
that, the KV of a conversation whose reply called tools is copied to host memory. The next turn
begins with the same tokens: when it starts, the part of them that the device has no longer is
copied back into the prefix cache, where SGLang's prefill finds it.

Every decision is a function of the request stream, the pool and the clock of the pass, so all TP
ranks decide alike.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import _req_radix_key

from pascal_sglang.engine.kv.host_copies import EntryCopies
from pascal_sglang.engine.kv.host_kv import HostKV
from pascal_sglang.engine.kv.pool import Pool
from pascal_sglang.engine.kv.transfers import Transfer, Transfers
from pascal_sglang.engine.req_attributes import state_of
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import all_agree
from pascal_sglang.policy.kv_tier import Costs
from pascal_sglang.policy.prefix_namespace import Namespace, namespace_of
from pascal_sglang.policy.tool_waits import (
    Conversation,
    ToolWaits,
    distinct_tokens,
    shared_tokens,
)

# What came of a conversation's KV. copied: the next turn got it back from host memory. resident:
# the device had it still. lost: neither had it, or a copy would have taken longer than a prefill.
# elsewhere: the next turn went to another instance. expired: none came in time. forgotten: there
# were too many.
OUTCOMES = ("copied", "resident", "lost", "elsewhere", "expired", "forgotten")
# Seconds between two looks for what has expired, and for what the prefix cache has.
LOOK_S = 0.25


@dataclass(slots=True, eq=False)
class Save:
    """Tokens of a conversation on their way to the host."""

    conversation: Conversation
    # The conversation's host memory when the copy began; `piece` is the part that it fills.
    copy: HostKV
    piece: HostKV
    transfer: Transfer
    # The node of the prefix cache up to which it had the conversation, and how many tokens.
    node: Any
    tokens: int
    # Whether steps wait for the copy.
    holds: bool = False


class ToolKV:
    """Owns the host memory for KV of conversations that wait, and the copies there and back."""

    # Conversations by outcome, and tokens that were saved and copied back.
    counts: Counter[str]
    # Tokens in host memory.
    kept_tokens: int

    def __init__(
        self,
        scheduler: SchedulerProtocol,
        pool: Pool,
        copies: EntryCopies,
        transfers: Transfers,
        costs: Costs,
        wait_of: Callable[[Req], tuple[bool, float | None]],
        is_queued: Callable[[Req], bool],
        *,
        lru: bool,
    ) -> None:
        """copies: of plain KV alone. transfers: all copies that are under way. wait_of: whether
        the conversation of a request that ended is expected to go on, and for how many seconds its
        KV is to be kept if it says that. is_queued: whether a request waits to start. lru: whether
        the prefix cache evicts first what has not been used for longest."""
        self._scheduler = scheduler
        self._pool = pool
        self.copies = copies
        self._transfers = transfers
        self._costs = costs
        self._wait_of = wait_of
        self._is_queued = is_queued
        self._lru = lru
        self.waits = ToolWaits()
        self.counts = Counter()
        self.kept_tokens = 0
        self._arrived: list[Req] = []
        self._ended: list[tuple[Req, float | None]] = []
        # Prompts of requests that went elsewhere.
        self._elsewhere: list[tuple[array[int], Namespace]] = []
        # In the order in which they began.
        self._saving: list[Save] = []
        # When to look again for what has expired, and for what the prefix cache has.
        self._look_at = self._touch_at = 0.0
        # As of the last look there: tokens of those that are not saved, and of requests that have
        # ended since.
        self._unsaved_tokens = self._newer_tokens = 0
        # Whether requests have ended since the last pass, whose step in flight still runs.
        self._just_ended = False

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory, of this rank."""
        return self.kept_tokens * self.copies.bytes_per_entry

    def arrived(self, req: Req) -> None:
        """A request has come and waits to start."""
        # A session's KV is its own, and one that has begun has KV already.
        if req.session is None and not req.output_ids:
            self._arrived.append(req)

    def ended(self, reqs: Sequence[Req]) -> None:
        """Requests have ended, and their KV is in the prefix cache."""
        self._just_ended = True
        for req in reqs:
            self._newer_tokens += len(req.origin_input_ids) + len(req.output_ids)
            state = state_of(req)
            if state.internal or not state.keeps_kv:
                continue
            if req.session is not None or req.input_embeds is not None:
                continue
            waits, asked_s = self._wait_of(req)
            if waits:
                self._ended.append((req, asked_s))

    def elsewhere(self, ids: array[int], namespace: Namespace) -> None:
        """A request with this prompt went to another instance, though this one may keep KV for
        it."""
        self._elsewhere.append((ids, namespace))

    def left(self, req: Req) -> None:
        """A request has migrated."""
        self._went_elsewhere(self.waits.left(req))

    def _went_elsewhere(self, conversation: Conversation | None) -> None:
        if conversation is not None:
            self.counts["elsewhere"] += not conversation.expired
            self._let_go(conversation)

    def step(self, now: float, spare_tokens: int) -> None:
        """Begin a pass: take in who came and ended, let go of what is over, and save what the next
        steps may evict. spare_tokens: KV entries that are free after them, without evictions."""
        self._finish_saves()
        ended, self._ended = self._ended, []
        arrived, self._arrived = self._arrived, []
        elsewhere, self._elsewhere = self._elsewhere, []
        for req, asked_s in ended:
            ids, prompt = _tokens(req), len(req.origin_input_ids)
            for each in self.waits.replied(ids, prompt, namespace_of(req), now, asked_s):
                self.counts["forgotten"] += not each.expired
                self._let_go(each)
        for ids, namespace in elsewhere:
            self._went_elsewhere(self.waits.elsewhere(ids, namespace, now))
        for req in arrived if len(self.waits) else ():
            self.waits.arrived(req, _tokens(req), namespace_of(req), now)
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            # Refused, or started in an order that is not the plan's.
            self.waits.release(lambda req: not self._is_queued(req))
            for each in self.waits.expire(now):
                self.counts["expired"] += 1
                self._let_go(each)
        self._save(now, spare_tokens)
        self._just_ended = False

    def _save(self, now: float, spare_tokens: int) -> None:
        """Save the KV of those that have waited longest once the next steps may evict it, as much
        of it in a pass as they may evict."""
        chunk = self._scheduler.chunked_prefill_size
        most = self._scheduler.max_total_num_tokens
        if chunk is not None and 0 < chunk < most:
            most = chunk
        if spare_tokens >= most:
            return
        unsaved = [each for each in self.waits if not each.saved and not each.expired]
        if not unsaved:
            return
        if self._lru and self._evicts_others(unsaved, most - spare_tokens, now):
            return
        left, room = most, self.copies.room
        with self.copies.together():
            for each in unsaved:
                if left <= 0:
                    break
                if not each.saved and (each.copy is not None or len(each.ids) <= room):
                    left -= self._save_some(each, left)
                    room = self.copies.room

    def _evicts_others(self, unsaved: Sequence[Conversation], tokens: int, now: float) -> bool:
        """Whether the prefix cache has `tokens` to evict before any of these."""
        evictable: int = self._pool.tree.evictable_size()
        others = evictable - self._unsaved_tokens
        # Those that came since the last look may be all that is in the way.
        if now >= self._touch_at or others - self._newer_tokens < tokens <= others:
            self._touch_at = now + LOOK_S
            self._touch(unsaved)
            others = evictable - self._unsaved_tokens
        return others - self._newer_tokens >= tokens

    def _touch(self, unsaved: Sequence[Conversation]) -> None:
        """Use what the prefix cache has of these, so that it evicts all else before, and count
        it. Those of which it has nothing have nothing to save."""
        tokens = []
        for each in unsaved:
            there: int = self._match(each).device_prefix_len
            each.saved = not there
            tokens.append(each.ids[:there])
        self._unsaved_tokens, self._newer_tokens = distinct_tokens(tokens), 0

    def _match(self, conversation: Conversation) -> Any:
        """What the prefix cache has of a conversation, but for its last token: the step after the
        one that gave it may have begun, and still be writing its entry."""
        tree = self._pool.tree
        key = _req_radix_key(tree, conversation.namespace, conversation.ids[:-1])
        return tree.match_prefix(MatchPrefixParams(key=key))

    def _save_some(self, conversation: Conversation, most: int) -> int:
        """Begin to copy the next tokens that the device has of a conversation, at most `most`;
        returns their number. There is room for all of them."""
        copy: HostKV | None = conversation.copy
        match = self._match(conversation)
        tokens: int = match.device_prefix_len
        if copy is None and tokens:
            copy = conversation.copy = self.copies.take(tokens)
            self.kept_tokens += tokens
        whole = 0 if copy is None else min(tokens, copy.tokens)
        begin, end = conversation.begun, min(whole, conversation.begun + most)
        conversation.saved = end == whole or end <= begin
        if copy is None or end <= begin:
            return 0
        locations = self._pool.tree.path_device_indices(match.last_device_node)[begin:end]
        piece = copy.between(begin, end)
        # Entries of a request that has just ended may be another's too.
        self.copies.read(locations, piece, after_steps=self._just_ended)
        conversation.begun = end
        transfer = self._transfers.begin([(self.copies, piece)])
        node = match.last_device_node
        self._saving.append(Save(conversation, copy, piece, transfer, node, tokens))
        return end - begin

    def hold_steps(self) -> None:
        """A step is about to be launched. It waits for the copies to the host whose entries may be
        written by it: those that the prefix cache has evicted since.

        Nothing is locked for a copy: it would look to the plan as if memory were short.
        """
        for save in self._saving:
            if save.holds or save.copy is not save.conversation.copy:
                continue
            match = self._match(save.conversation)
            if (match.last_device_node, match.device_prefix_len) != (save.node, save.tokens):
                save.holds = True
                self.copies.hold_steps(save.piece)

    def _finish_saves(self) -> None:
        """Count what is in host memory on every rank, and let go of conversations of which a rank
        has not copied a part. Nothing is waited for."""
        saving, self._saving = self._saving, []
        for save in saving:
            conversation, transfer = save.conversation, save.transfer
            if conversation.copy is not save.copy:
                continue  # It was let go meanwhile.
            if transfer.complete is None:
                self._saving.append(save)
            elif transfer.complete:
                self.counts["saved"] += not conversation.kept
                conversation.kept += save.piece.tokens
                self.counts["saved_tokens"] += save.piece.tokens
            else:
                self.counts["copy_failed"] += 1
                conversation.saved = True
                self._let_go(conversation)

    def _wait_for(self, conversation: Conversation) -> None:
        """Until all of it whose copy has begun is in host memory, or is known to have failed."""
        own = (save.transfer for save in self._saving if save.copy is conversation.copy)
        self._transfers.finish(*own)
        self._finish_saves()

    def _let_go(self, conversation: Conversation) -> None:
        """Give back the host memory of a conversation, if it has some. Whatever is copied there
        next comes after the copies that are under way."""
        copy: HostKV | None = conversation.copy
        conversation.copy, conversation.kept, conversation.begun = None, 0, 0
        if copy is not None:
            self.kept_tokens -= copy.tokens
            self.copies.free(copy)

    def bring_back(self, req: Req) -> None:
        """The request starts in this pass: what the conversation that it goes on with has in host
        memory, and the prefix cache no longer, goes there."""
        conversation = self.waits.of(req)
        if conversation is None:
            return
        self.waits.remove(conversation)
        try:
            self.counts[self._copy_back(req, conversation)] += 1
        finally:
            self._let_go(conversation)

    def _copy_back(self, req: Req, conversation: Conversation) -> str:
        """Returns what came of it, one of `OUTCOMES`."""
        pool, ids = self._pool, _tokens(req)
        page = self._scheduler.page_size
        # The last token is prefilled in any case: its output is the next one. The last one of the
        # reply may have no entry.
        most = min(shared_tokens(conversation.ids, ids), len(ids) - 1, len(conversation.ids) - 1)
        most = most // page * page
        prefix = pool.cached_prefix(req, most)
        had = prefix.tokens
        if had < min(most, conversation.begun):
            # The device has lost already what is only being copied.
            self._wait_for(conversation)
        copy: HostKV | None = conversation.copy
        whole = had if copy is None else min(most, conversation.kept)
        if whole <= had:
            return "resident" if had and (copy is not None or had >= most) else "lost"
        if not self._costs.copy_pays(whole - had):
            return "lost"
        assert copy is not None
        own: torch.Tensor | None = None
        lock = pool.lock(prefix.node) if had else None  # Before anything is evicted.
        try:
            own = pool.take(whole - had)
            # The nodes of those that were evicted for it may be made anew below.
            self.hold_steps()
            if own is None or not self._load(copy, had, whole, own):
                return "lost"
            locations = own.to(torch.int64)
            if had:
                path = pool.tree.path_device_indices(prefix.node)[:had]
                locations = torch.cat([path.to(torch.int64), locations])
            key = _req_radix_key(pool.tree, req, ids[:whole])
            own = None  # The cache owns them from here on.
            pool.tree.insert(InsertParams(key=key, value=locations, prev_prefix_len=had))
        finally:
            if own is not None:
                pool.give(own)
            if lock is not None:
                pool.unlock(lock)
            pool.changed()
        self.counts["copied_tokens"] += whole - had
        return "copied"

    def _load(self, copy: HostKV, begin: int, end: int, locations: torch.Tensor) -> bool:
        """Begin to write tokens of a copy to `locations`; steps launched from now on see them.
        False if a rank's device failed: nothing is under way then."""
        part = copy.between(begin, end)
        self.copies.to_device(part, locations)
        if all_agree(self._scheduler, not part.failed):
            self.copies.hold_steps(part)
            return True
        self.counts["copy_failed"] += 1
        self.copies.wait(part)
        return False

    def forget(self, matches: Callable[[str], bool]) -> None:
        """Drop what is kept for next turns whose id `matches`: they are aborted."""
        self._arrived = [req for req in self._arrived if not matches(req.rid)]
        for each in self.waits.forget(lambda req: matches(req.rid)):
            self._let_go(each)

    def drop(self) -> None:
        """Drop all that is kept: it is no longer valid, or nobody goes on with it."""
        self._ended.clear()
        self._elsewhere.clear()
        for each in self.waits:
            self.waits.remove(each)
            self._let_go(each)

    def describe(self) -> dict[str, Any]:
        """For `GET /pascal/status`."""
        return {
            "waiting": len(self.waits),
            "keep_s": self.waits.times.keep_s,
            "host_tokens": self.kept_tokens,
            "host_bytes": self.host_bytes,
            "host_capacity": self.copies.capacity,
            "counts": dict(self.counts),
        }


def _tokens(req: Req) -> array[int]:
    """The request's prompt, and what of its output is its reply."""
    end = req.finished_len if req.finished_len is not None else len(req.output_ids)
    return array("q", req.origin_input_ids + req.output_ids[:end])
