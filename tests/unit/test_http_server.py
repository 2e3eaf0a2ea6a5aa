"""What asks every instance for its state ends in time, and a change is made as it is sent."""

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import HTTPException
from sglang.srt.entrypoints import http_server as stock
from sglang.srt.managers import io_struct as io
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.tokenizer_control_mixin import TokenizerControlMixin

from pascal_sglang.config import CONFIG_ENV, PascalConfig
from pascal_sglang.entrypoints import http_server

CHANGE = b'{"answer_tpot_ms": 40}'
# Long enough for whatever a test starts to get as far as it gets.
TURN_S = 0.01
BOUND_S = 10


class Manager:
    """SGLang's communicator, and what it has sent to `count` instances."""

    get_internal_state = TokenizerControlMixin.get_internal_state

    def __init__(self, count):
        self.sent = []
        self.server_args = None
        self.get_internal_state_communicator = FanOutCommunicator(self.sent.append, count)

    def auto_create_handle_loop(self):
        """The test hands replies over itself."""

    def reply(self, rank=0):
        state = {"pascal": {"dp_rank": rank}, "of_sglang": rank}
        output = io.GetInternalStateReqOutput(internal_state=state)
        self.get_internal_state_communicator.handle_recv(output)


@pytest.fixture
def made(monkeypatch):
    """Makes the manager of as many instances; `made.gone_by` is what this process went by since."""

    def make(count=1):
        manager = Manager(count)
        state = SimpleNamespace(tokenizer_manager=manager)
        monkeypatch.setattr(stock, "get_global_state", lambda: state)
        return manager

    make.gone_by = []
    monkeypatch.setenv(CONFIG_ENV, PascalConfig().to_json())
    monkeypatch.setattr(http_server, "STATUS_S", 0.3)
    monkeypatch.setattr(http_server, "check_frontend", lambda *_: None)
    monkeypatch.setattr(http_server.answer_eta, "reconfigure", make.gone_by.append)
    return make


async def server_info(manager):
    asked = http_server.withhold_status(Manager.get_internal_state, manager)
    return await asyncio.wait_for(asked, BOUND_S)


def tpot():
    return PascalConfig.from_env().answer_tpot_ms


def test_a_change_that_cannot_be_sent_changes_nothing(made):
    """Another request waits for an instance that has fallen silent."""

    async def run():
        manager = made()
        before = asyncio.create_task(manager.get_internal_state())
        await asyncio.sleep(TURN_S)
        with pytest.raises(TimeoutError, match="nothing has changed"):
            await http_server.change_configuration(CHANGE)
        assert [request.rid for request in manager.sent] == [None]
        assert (tpot(), made.gone_by) == (PascalConfig().answer_tpot_ms, [])
        manager.reply()
        await before
        change = asyncio.create_task(http_server.change_configuration(CHANGE))
        await asyncio.sleep(TURN_S)
        manager.reply()
        await change
        assert (tpot(), len(made.gone_by), len(manager.sent)) == (40, 1, 2)
        assert manager.get_internal_state_communicator._send == manager.sent.append

    asyncio.run(run())


def test_a_change_that_was_sent_stands_without_an_answer(made):
    async def run():
        manager = made()
        with pytest.raises(TimeoutError, match="it changes when it goes on"):
            await http_server.change_configuration(CHANGE)
        assert {request.rid for request in manager.sent} == {'{"answer_tpot_ms": 40}'}
        assert tpot() == 40

    asyncio.run(run())


def test_server_info_ends_in_time_and_keeps_nobody_waiting(made):
    async def run():
        manager = made()
        with pytest.raises(HTTPException, match="does not answer") as caught:
            await server_info(manager)
        assert caught.value.status_code == 504
        asked = asyncio.create_task(server_info(manager))
        await asyncio.sleep(TURN_S)
        manager.reply()
        assert await asked == [{"of_sglang": 0}]

    asyncio.run(run())


def test_a_late_answer_is_not_taken_for_that_of_another_instance(made):
    async def run():
        manager = made(2)
        asked = asyncio.create_task(server_info(manager))
        for ranks in ((0, 0), (1, 0)):
            await asyncio.sleep(TURN_S)
            for rank in ranks:
                manager.reply(rank)
        assert await asked == [{"of_sglang": 1}, {"of_sglang": 0}]

    asyncio.run(run())
