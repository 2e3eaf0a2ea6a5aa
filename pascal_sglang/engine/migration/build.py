"""Decides whether an instance's requests can move, and sets up what that takes."""

from __future__ import annotations

import logging
import os
from typing import Any

from sglang.srt.runtime_context import get_parallel, get_serving

from pascal_sglang.cluster import messages
from pascal_sglang.cluster.control_channel import POST_ENV, Pen
from pascal_sglang.cluster.migration_source import Terms
from pascal_sglang.cluster.transport import TransportError, make
from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.kv.serializer import kv_bytes_of
from pascal_sglang.engine.migration.control_receiver import Voice
from pascal_sglang.engine.migration.incoming import Arrivals
from pascal_sglang.engine.migration.manager import Moves
from pascal_sglang.engine.migration.outgoing import Departures
from pascal_sglang.engine.migration.prefill_gate import Clearance
from pascal_sglang.engine.migration.receive_buffer import Landing, landing_bytes, window_tokens
from pascal_sglang.engine.plan_executor import Governor
from pascal_sglang.engine.tp_ranks import all_agree, from_every_rank

logger = logging.getLogger(__name__)


def letters_here(config: PascalConfig) -> str | None:
    """The folder of the letter boxes where the controller places this process's requests; None
    otherwise."""
    return os.environ.get(POST_ENV) if config.places and get_parallel().dp_size > 1 else None


def moves_here(config: PascalConfig) -> str | None:
    """The folder of the letter boxes where this process's requests may move; None otherwise."""
    return os.environ.get(POST_ENV) if config.moves and get_parallel().dp_size > 1 else None


def build_moves(scheduler: Any, governor: Governor | None, config: PascalConfig) -> Moves | None:
    """The moves of a scheduler with a governor; None, and logged, where requests cannot move."""
    folder = moves_here(config)
    if folder is None or governor is None:
        return None
    serving = get_serving()
    reasons = {
        "more than one node": get_parallel().nnodes > 1,
        "--tokenizer-worker-num above 1": serving.tokenizer_worker_num > 1,
        "--detokenizer-worker-num above 1": serving.detokenizer_worker_num > 1,
        "--skip-tokenizer-init": serving.skip_tokenizer_init,
        "SGLANG_RUST_SERVER": scheduler.rust_server is not None,
    }
    kv = kv_bytes_of(scheduler, governor.ladder.copies)
    problem = next((f"with {name}" for name, holds in reasons.items() if holds), None)
    problem = kv if isinstance(kv, str) else problem
    transport = None
    if problem is None and not isinstance(kv, str):
        try:
            piece = window_tokens(kv) * kv.per_token
            size = landing_bytes(kv)
            transport = make(config.kv_transport, size, piece, kv.copies.pin, config.kv_listen)
        except TransportError as error:
            if config.kv_transport != "auto":
                raise RuntimeError(f"KV transport {config.kv_transport}: {error}") from error
            problem = str(error)
    if not all_agree(scheduler, problem is None):
        logger.warning("pascal_sglang: requests do not move here: %s", problem or "on another rank")
        return None
    assert transport is not None
    assert not isinstance(kv, str)
    leads = get_parallel().attn_tp_rank == 0
    voice = Voice(Pen(folder, get_parallel().dp_rank or 0) if leads else None)
    terms = Terms(live=config.live_migration)
    landing = Landing(governor.pool, kv, transport.landing)
    landings = from_every_rank(scheduler, transport.address)
    for other in range(get_parallel().dp_size):
        if other != (get_parallel().dp_rank or 0):
            voice.say(other, [messages.Landings(landings)])
    clearance = Clearance()
    window = landing.window
    departures = Departures(scheduler, governor, terms, transport, kv, window, voice, clearance)
    arrivals = Arrivals(scheduler, governor, terms, landing, landings, voice, clearance)
    return Moves(governor, departures, arrivals, voice, config.flood)
