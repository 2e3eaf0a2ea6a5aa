"""Both sides of moves on one scheduler of `bed.run`: a request leaves it as the first of two
instances, and comes to it as the second. Pools, receive buffer, copies, messages and leak checks
are the real ones; a message takes a pass."""

import itertools
import random
import tempfile

# The chance per pass that a request is told to move; in every so many-th pass in which something
# comes, the target gives it up.
MOVES, GIVES_UP = 0.2, 12
# Tokens of a piece: several pieces a move, between which windows slide.
PIECE = 32

# Of `bed.run`.
HOOKS = {
    "prepare": "tests.engine.inproc.loopback:prepare",
    "each_pass": "tests.engine.inproc.loopback:moves",
}

_DICE = random.Random(3)
_COMING = itertools.count(1)
_MAIL = []


class Mailbox:
    """Takes the place of the sockets."""

    def __init__(self, folder, instance):
        pass

    def send(self, to, message):
        _MAIL.append((to, message))
        return True


def prepare():
    """There are two instances, as far as moves go."""
    from pascal_sglang import support
    from pascal_sglang.engine.migration import build, manager, receive_buffer

    support.INSTANCES = ()
    build.migration_place = lambda config: tempfile.gettempdir()
    build.ControlSender = Mailbox
    build.instance_count = manager.instance_count = lambda: 2
    receive_buffer.WINDOW_TOKENS = PIECE


def moves(scheduler, reqs, passes):
    """Deliver what was said in the last pass, and order moves."""
    from pascal_sglang import clock
    from pascal_sglang.cluster.codec import pack
    from pascal_sglang.cluster.messages import MigrateCommand
    from pascal_sglang.engine.migration.control_receiver import ControlBatch

    migrations = scheduler.migrations
    migrations._instances = 2
    heard = [pack(message, 1 - to) for to, message in _MAIL if to in (0, 1)]
    _MAIL.clear()
    paused = scheduler.plan_executor.paused_requests.paused()
    for req in (*scheduler.running_batch.reqs, *paused):
        if _DICE.random() < MOVES and not req.finished():
            heard.append(pack(MigrateCommand(f"{req.rid}-{passes}", req.rid, 1)))
    scheduler.take_control_batch(ControlBatch(clock.now(), heard))
    # What goes on is another object.
    reqs.update({req.rid: req for req in migrations.incoming_migrations.arrived})
    if migrations.incoming_migrations.under_way and next(_COMING) % GIVES_UP == 0:
        migrations.incoming_migrations.give_up("a test")


def assert_moved(outcome):
    """Requests moved, some moves failed half way, and both sides know of the same."""
    migrations = outcome.status["migrations"]
    assert migrations["outgoing"]["moved"] == migrations["incoming"]["taken"] > 5, migrations
    assert migrations["incoming"]["a test"] > 0, migrations
    assert (migrations["rejected"], migrations["awaiting_token"]) == ({}, 0)
