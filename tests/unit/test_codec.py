"""Control messages: what comes out is what went in, and anything else is rejected and counted."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.cluster import messages
from pascal_sglang.cluster.codec import (
    KINDS,
    MAX_HANDOVER_BYTES,
    VERSION,
    BadMessage,
    pack,
    unpack,
)
from pascal_sglang.cluster.control_channel import CONTROLLER, ControlReceiver, ControlSender
from pascal_sglang.cluster.location_check import MAX_ASKED, MAX_CHARACTERS
from pascal_sglang.cluster.messages import (
    MAX_ITEMS,
    MAX_REASON,
    MAX_REASONS,
    MAX_STATE_BYTES,
    MAX_TEXT,
    ChunkAck,
    CommitAck,
    ControlAnswered,
    DrainCommand,
    DrainProgress,
    DrainReply,
    DrainRequest,
    Handover,
    InstanceDown,
    KVChunk,
    LoadReport,
    LocationQuery,
    LocationReply,
    MayEnd,
    MigrateCommand,
    MigrationCancelled,
    MigrationEnded,
    ReasoningEnded,
    ReceiveBuffers,
    RequestFinished,
    ReserveGranted,
    ReserveRequest,
    Terminating,
    TurnElsewhere,
    WriteQuery,
)
from pascal_sglang.cluster.prefix_index import block_names
from pascal_sglang.policy.placement import FIGURES

STATUS = LoadReport(
    dp_rank=1,
    received=2,
    on_pace=True,
    footprint=3,
    reasoning=4,
    fresh=5,
    free=6,
    fits=12,
    waiting=7,
    capacity=8,
    load=9,
    batch=7,
    pass_us=10,
    prefill_ns=11,
)
ALL = [
    ReceiveBuffers(["a", "b"]),
    ReserveRequest("m", "r", 70, 30, "layout"),
    ReserveGranted("m", ["a", "b"], 4096, 512),
    KVChunk("m", 0, 40, 30, False),
    ChunkAck("m", 40),
    Handover("m", 40, 50, 30, b"\x00\xff" * 200),
    CommitAck("m"),
    MigrationCancelled("m"),
    WriteQuery("m"),
    ReasoningEnded(1, "r", 70, 200, 100, 4),
    MigrateCommand("m", "r", 1),
    DrainCommand("m", "r", 1, True),
    MigrationEnded(1, "m", False, "full"),
    DrainRequest(3, 1, False),
    DrainReply(3, "", DrainProgress("draining", 5, 2, 7, {"a session": 1}, 1.5)),
    Terminating(1, 0),
    MayEnd("the last one"),
    RequestFinished(1, "r", [1, 2**47]),
    TurnElsewhere(bytes(16), None, "salt"),
    InstanceDown(0),
    LocationQuery(3, ["r", "s"]),
    LocationReply(1, 3, 70, ["s"]),
    ControlAnswered(0, "FlushCacheReqInput"),
    STATUS,
]


@pytest.mark.parametrize("message", ALL, ids=lambda m: type(m).__name__)
def test_a_message_survives_the_wire(message):
    assert unpack(pack(message, 1), 2) == (1, message)


# The longest texts and numbers there are: each character takes four bytes.
TEXT, NUMBER = "\U0010ffff" * MAX_TEXT, (1 << 53) - 1
IDS = [TEXT[: MAX_CHARACTERS // MAX_ASKED]] * MAX_ASKED
REASONS = {f"{i:02}{TEXT[: MAX_REASON - 2]}": NUMBER for i in range(MAX_REASONS)}
LONGEST = [
    ReserveRequest("m" * 32, TEXT, NUMBER, NUMBER, TEXT),
    ReserveGranted("m" * 32, ["x" * 300] * 64, NUMBER, NUMBER),
    ReasoningEnded(1, TEXT, NUMBER, NUMBER, NUMBER, NUMBER),
    MigrateCommand("m" * 32, TEXT, 1),
    DrainCommand("m" * 32, TEXT, 1, False),
    DrainReply(
        NUMBER, TEXT, DrainProgress("draining", NUMBER, NUMBER, NUMBER, REASONS, float(NUMBER))
    ),
    MigrationEnded(1, "m" * 32, False, TEXT),
    RequestFinished(1, TEXT, [(1 << 48) - 1] * MAX_ITEMS),
    LocationQuery(NUMBER, IDS),
    LocationReply(1, NUMBER, NUMBER, IDS),
    Handover(TEXT, NUMBER, NUMBER, NUMBER, bytes(MAX_STATE_BYTES)),
    TurnElsewhere(bytes(MAX_STATE_BYTES), TEXT, TEXT),
]


@pytest.mark.parametrize("message", LONGEST, ids=lambda m: type(m).__name__)
def test_the_longest_message_fits(message):
    assert unpack(pack(message, 1), 2) == (1, message)


def test_the_end_of_a_request_of_any_length_fits():
    blocks = list(block_names(range(64 * MAX_ITEMS)))
    assert len(blocks) == MAX_ITEMS
    assert unpack(pack(RequestFinished(0, TEXT, blocks)), 1)[1].blocks == blocks


def test_every_kind_is_among_those():
    assert {type(m).__name__ for m in ALL} | {"ReserveRefused"} == set(KINDS)
    declared = {k for k in vars(messages).values() if isinstance(k, type)}
    bases = {messages.ControlMessage, messages.Message}
    assert {k for k in declared - bases if issubclass(k, messages.ControlMessage)} == set(
        KINDS.values()
    )


def test_a_load_report_has_every_figure():
    assert set(LoadReport.__struct_fields__) == {"dp_rank", "received", *FIGURES}


def altered(message, /, **changes):
    """A message with other fields, or of another kind."""
    values = msgspec.msgpack.decode(pack(message))
    return msgspec.msgpack.encode({**values, "message": {**values["message"], **changes}})


def sealed(message, /, **changes):
    """A message in another envelope."""
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(pack(message)), **changes})


def without(message, name):
    values = msgspec.msgpack.decode(pack(message))
    del values["message"][name]
    return msgspec.msgpack.encode(values)


OLD = b'{"version":2,"kind":"InstanceDown","sender":0,"dp_rank":0}'
DEEP = b"\x91" * 100_000 + b"\x01"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not MessagePack"),
        (b"\x91\x01", "no envelope of this version"),
        (b"\x80", "no envelope of this version"),
        (b"\x80\x04K\x01.", "no envelope of this version"),
        (pack(STATUS) + b"\x01", "not MessagePack"),
        (pack(STATUS)[:-1], "not MessagePack"),
        (OLD, "no envelope of this version"),
        (sealed(STATUS, version=VERSION - 1), "no envelope of this version"),
        (sealed(STATUS, version=VERSION + 1), "no envelope of this version"),
        (sealed(STATUS, version=float(VERSION)), "no envelope of this version"),
        (sealed(STATUS, more=1), "no envelope of this version"),
        (sealed(STATUS, sender=2), "no such sender"),
        (sealed(STATUS, sender="0"), "no envelope of this version"),
        (sealed(STATUS, sender=-1), "no envelope of this version"),
        (sealed(STATUS, message=1), "unknown kind"),
        (sealed(STATUS, message={}), "unknown kind"),
        (altered(STATUS, kind="Bogus"), "unknown kind"),
        (altered(STATUS, kind=["LoadReport"]), "unknown kind"),
        (altered(STATUS, fre=1), "LoadReport: malformed"),
        (without(STATUS, "free"), "LoadReport: malformed"),
        (without(KVChunk("m", 0, 40, 30, False), "last"), "KVChunk: malformed"),
        (altered(STATUS, free=-1), "LoadReport: malformed"),
        (altered(STATUS, free=9.5), "LoadReport: malformed"),
        (altered(STATUS, free=9.0), "LoadReport: malformed"),
        (altered(STATUS, free=True), "LoadReport: malformed"),
        (altered(STATUS, free=2**53), "LoadReport: malformed"),
        (altered(STATUS, on_pace=1), "LoadReport: malformed"),
        (altered(STATUS, dp_rank=7), "LoadReport: no such instance"),
        (altered(MigrateCommand("m", "r", 0), target=7), "MigrateCommand: no such instance"),
        (altered(MigrateCommand("m", "r", 0), rid="x" * (MAX_TEXT + 1)), "MigrateCommand: mal"),
        (pack(MigrateCommand("m", "xyz", 0)).replace(b"xyz", b"x\xffz"), "MigrateCommand: mal"),
        (altered(ReserveGranted("m", [], 0, 0), receive_buffers=[1]), "ReserveGranted: malformed"),
        (altered(ReserveGranted("m", [], 0, 0), receive_buffers="a"), "ReserveGranted: malformed"),
        (pack(RequestFinished(0, "r", [1] * (MAX_ITEMS + 1))), "RequestFinished: malformed"),
        (pack(RequestFinished(0, "r", [2**53])), "RequestFinished: malformed"),
        (altered(Handover("m", 0, 0, 0, b""), state=[]), "Handover: malformed"),
        (altered(Handover("m", 0, 0, 0, b""), state="a"), "Handover: malformed"),
        (pack(Handover("m", 0, 0, 0, bytes(MAX_STATE_BYTES + 1))), "Handover: malformed"),
        (pack(LocationQuery(0, [TEXT] * MAX_ASKED)), "oversized"),
        (pack(TurnElsewhere(bytes(15), None, None)), "TurnElsewhere: malformed"),
        (pack(TurnElsewhere(bytes(8), TEXT + "x", None)), "TurnElsewhere: malformed"),
        (b" " * (MAX_HANDOVER_BYTES + 1), "oversized"),
        (DEEP, "no envelope of this version"),
        (pack(STATUS).replace(b"\xa7message", b"\xa7message" + DEEP), "not MessagePack"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_anything_else_is_rejected_by_reason(data, why):
    with pytest.raises(BadMessage, match=why) as rejected:
        unpack(data, 2)
    assert len(str(rejected.value)) < 64, "a label"


@given(st.binary(max_size=200))
def test_no_bytes_take_the_reader_down(data):
    with pytest.raises(BadMessage):
        unpack(data, 1)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda s: st.lists(s)))
def test_no_values_take_the_reader_down(value):
    for message in ALL:
        values = msgspec.msgpack.decode(pack(message))
        for change, names in ((sealed, values), (altered, values["message"])):
            for name in names:
                try:
                    unpack(change(message, **{name: value}), 2)
                except (BadMessage, OverflowError, UnicodeEncodeError):
                    continue


def test_letters_arrive_in_order_and_bad_ones_are_counted(tmp_path):
    control_receiver, control_sender = (
        ControlReceiver(str(tmp_path), CONTROLLER, 2),
        ControlSender(str(tmp_path), sender=1),
    )
    assert all(control_sender.send(CONTROLLER, m) for m in ALL)
    control_sender._sockets[CONTROLLER].send(b"bogus")
    got = []
    while len(got) < len(ALL) + 1:
        assert control_receiver.socket.poll(60_000)
        got += control_receiver.receive()
    assert [read for data in got if (read := control_receiver.read(data))] == [(1, m) for m in ALL]
    assert control_receiver.rejected == {"no envelope of this version": 1}


def test_what_has_no_form_is_dropped_not_raised(tmp_path):
    control_sender = ControlSender(str(tmp_path))
    for number, text in enumerate(("\ud800", 2**70, object()), start=1):
        assert not control_sender.send(0, CommitAck(text))
        assert control_sender.dropped == number


def test_nobody_waits_for_who_does_not_listen(tmp_path):
    control_sender = ControlSender(str(tmp_path))
    while control_sender.send(0, CommitAck("m")):
        pass
    assert control_sender.dropped == 1
