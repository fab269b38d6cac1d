"""A gateway that lends nothing answers as one that does: nobody takes connections, or nobody takes more of them."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from ingest.lending import READS_BEFORE, TIMES_MAX, Lender, reads_before
from tests.ingest.gateway.test_fast_relay import BALANCES, Asked, whole
from tests.support.servers.gateway import RunningGateway
from tests.support.waiting import until


@pytest.fixture
def api() -> Iterator[Asked]:
    """A query API that answers everything with ``{}``."""
    api = Asked(whole(b"{}"))
    yield api
    api.close()


def read_often(running: RunningGateway, api: Asked) -> None:
    """More reads than make a reader, each answered by the query API."""
    for number in range(3 * READS_BEFORE):
        assert running.client.get(BALANCES).content == b"{}"
        assert len(api.requests) == number + 1


@pytest.mark.parametrize("is_there", [False, True])
def test_without_anybody_at_the_socket_reads_are_passed_on(api: Asked, tmp_path: Path, is_there: bool) -> None:
    """Whether there is none, or one that nobody listens at any more."""
    path = tmp_path / "lend.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        if is_there:
            listener.bind(str(path))
    with RunningGateway(upstream=api.address, lending=str(path)) as running:
        read_often(running, api)


def test_where_requests_are_counted_nothing_is_lent(api: Asked, tmp_path: Path) -> None:
    """The limit on requests a minute is the gateway's to keep."""
    path = tmp_path / "lend.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(0)
        with RunningGateway(upstream=api.address, lending=str(path), requests_per_minute=1_000) as running:
            read_often(running, api)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_channel_that_takes_no_more_keeps_what_is_there(tmp_path: Path) -> None:
    """Connections that the other side has not taken yet wait there, a bounded number; it is asked again later."""
    path = tmp_path / "lend.sock"
    mine, client = socket.socketpair()

    async def lending(listener: socket.socket) -> None:
        lender = Lender(str(path), lambda connection, _: connection.close())
        lent = 0
        while lender.lend(mine.fileno(), 0):
            lent += 1
            assert lent < 10_000, "the channel has no end"
        channel, _ = listener.accept()
        with channel:
            for _ in range(lent):
                said, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
                assert (said, len(descriptors)) == (b"\0", 1)
                os.close(descriptors[0])
            assert lender.lend(mine.fileno(), 0)
        lender.close()

    with mine, client, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        asyncio.run(lending(listener))


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_what_came_back_before_the_end_is_taken_back(
    tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """All of it, though the channel is of no use any more for whoever lends, and breaks with something unread in it."""
    path, back = tmp_path / "lend.sock", list[socket.socket]()
    mine, client = socket.socketpair()

    async def lending(listener: socket.socket) -> None:
        lender = Lender(str(path), lambda connection, _: back.append(connection))
        assert lender.lend(mine.fileno(), 0)
        channel, _ = listener.accept()
        for _ in range(5):
            socket.send_fds(channel, [b"\1"], [mine.fileno()])
        channel.close()  # with what was lent unread
        assert not lender.lend(mine.fileno(), 0)
        await until(lambda: len(back) == 5)
        lender.close()

    with mine, client, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(lending(listener))
    for connection in back:
        connection.close()


def test_each_time_takes_twice_as_many_reads_up_to_a_bound() -> None:
    """So that a connection that goes back and forth soon stays."""
    assert [reads_before(times) // READS_BEFORE for times in range(4)] == [1, 2, 4, 8]
    assert reads_before(TIMES_MAX) == reads_before(TIMES_MAX + 100)
