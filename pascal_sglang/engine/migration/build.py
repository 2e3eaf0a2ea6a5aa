"""Decides whether an instance's requests can move, and sets up what that takes."""

from __future__ import annotations

import logging
import os

from sglang.srt.runtime_context import get_parallel

from pascal_sglang.cluster import messages
from pascal_sglang.cluster.control_channel import CONTROL_ENV, ControlSender
from pascal_sglang.cluster.migration_pace import WAITED_SHARE, MigrationPace, NetworkPace
from pascal_sglang.cluster.migration_source import Terms
from pascal_sglang.cluster.transport import TransportError, make
from pascal_sglang.config import PascalConfig
from pascal_sglang.engine.host_memory import host_memory
from pascal_sglang.engine.kv.host_copies import HostCopies
from pascal_sglang.engine.kv.serializer import kv_bytes_of
from pascal_sglang.engine.migration.control_receiver import Rank0Sender
from pascal_sglang.engine.migration.incoming import IncomingMigrations
from pascal_sglang.engine.migration.manager import Migrations
from pascal_sglang.engine.migration.outgoing import OutgoingMigrations
from pascal_sglang.engine.migration.prefill_gate import PrefillGate
from pascal_sglang.engine.migration.receive_buffer import (
    ReceiveBuffer,
    piece_bytes,
    receive_buffer_bytes,
    window_bytes,
)
from pascal_sglang.engine.plan_executor import PlanExecutor
from pascal_sglang.engine.scheduler_protocol import SchedulerProtocol
from pascal_sglang.engine.tp_ranks import all_agree, from_every_rank
from pascal_sglang.instances import instance_count, own_instance, several_hosts, speaks
from pascal_sglang.support import Level, Support

logger = logging.getLogger(__name__)


def control_place(config: PascalConfig) -> str | None:
    """The place of the control sockets where the controller places this process's requests; None
    otherwise."""
    return os.environ.get(CONTROL_ENV) if config.places and instance_count() > 1 else None


def migration_place(config: PascalConfig) -> str | None:
    """The place of the control sockets where this process's requests may move; None otherwise."""
    return os.environ.get(CONTROL_ENV) if config.can_migrate and instance_count() > 1 else None


def most_window_bytes() -> int:
    """Bytes that a window of a receive buffer takes at most here; the same on all ranks."""
    ranks = instance_count() * get_parallel().attn_tp_size
    return window_bytes(host_memory().total, ranks)


def receive_bytes(
    scheduler: SchedulerProtocol, copies: HostCopies, config: PascalConfig, support: Support
) -> int:
    """Bytes of this rank's receive buffer, before it is made; 0 where requests do not move."""
    if migration_place(config) is None or support.level < Level.MOVE:
        return 0
    kv = kv_bytes_of(scheduler, copies)
    return 0 if isinstance(kv, str) else receive_buffer_bytes(kv, most_window_bytes())


def build_migrations(
    scheduler: SchedulerProtocol,
    executor: PlanExecutor | None,
    config: PascalConfig,
    support: Support,
) -> tuple[Migrations | None, Support]:
    """The moves of a scheduler with an executor; None, and logged, where requests cannot move. And
    the level; `support` is what the server and its pools leave."""
    place = migration_place(config)
    if place is None or executor is None:
        return None, support
    if support.level < Level.MOVE:
        logger.warning("pascal_sglang: requests do not move here, because of %s", support.reason)
        return None, support
    kv = kv_bytes_of(scheduler, executor.paused_requests.copies)
    problem = kv if isinstance(kv, str) else None
    if several_hosts() and config.kv_transport == "auto":
        problem = "instances on several hosts, and no --pascal-kv-transport between them"
    most = most_window_bytes()
    transport = None
    if problem is None and not isinstance(kv, str):
        try:
            piece, size = piece_bytes(kv, most), receive_buffer_bytes(kv, most)
            pin, unpin = kv.copies.pin, kv.copies.unpin
            transport = make(config.kv_transport, size, piece, pin, config.kv_listen, unpin)
            logger.info(
                "pascal_sglang: each rank takes %.2f GiB of host memory for requests that move to "
                "it",
                size / 2**30,
            )
        except TransportError as error:
            if config.kv_transport != "auto":
                raise RuntimeError(f"KV transport {config.kv_transport}: {error}") from error
            problem = str(error)
    if not all_agree(scheduler, problem is None):
        problem = problem or "another rank"
        logger.warning("pascal_sglang: requests do not move here: %s", problem)
        return None, support.lowered(Level.PAUSE, problem)
    assert transport is not None
    assert not isinstance(kv, str)
    leads = speaks()
    control_sender = Rank0Sender(ControlSender(place, own_instance()) if leads else None)
    terms = Terms(live=config.live_migration)
    receive_buffer = ReceiveBuffer(
        executor.pool, kv, transport.receive_buffer, executor.paused_requests.transfers, most
    )
    receive_buffers = from_every_rank(scheduler, transport.address)
    for other in range(instance_count()):
        if other != own_instance():
            control_sender.send(other, [messages.ReceiveBuffers(receive_buffers)])
    prefill_gate = PrefillGate()
    outgoing_migrations = OutgoingMigrations(
        scheduler=scheduler,
        states=executor.request_states,
        terms=terms,
        transport=transport,
        kv=kv,
        pace=MigrationPace(
            receive_buffer.slot_tokens,
            executor.capacity.step_tokens,
            executor.paused_requests.costs.copy_token_s or None,
            # As `OutgoingMigrations._sent`: the scheduler waits for the others' pieces.
            share=1.0 if kv.copies.deferred else WAITED_SHARE,
            network=None if transport.direct else NetworkPace(receive_buffer.slot_tokens),
        ),
        control_sender=control_sender,
        prefill_gate=prefill_gate,
    )
    incoming_migrations = IncomingMigrations(
        scheduler=scheduler,
        states=executor.request_states,
        capacity=executor.capacity,
        terms=terms,
        receive_buffer=receive_buffer,
        receive_buffers=receive_buffers,
        control_sender=control_sender,
        prefill_gate=prefill_gate,
    )
    migrations = Migrations(
        states=executor.request_states,
        outgoing_migrations=outgoing_migrations,
        incoming_migrations=incoming_migrations,
        control_sender=control_sender,
        force_migration=config.force_migration,
        moves_at_boundary=config.moves_at_boundary,
    )
    return migrations, support
