"""What a gateway sees of a lent connection: it comes back whole, or it is gone, and none is held for ever."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from aggregator.api import borrowed as module
from aggregator.api.at_once import AtOnce
from aggregator.api.borrowed import Borrowed
from tests.support.records import line
from tests.support.servers.query_api import Server, Tenant
from tests.support.waiting import until

Scenario = Callable[["Gateway"], Awaitable[None]]
SMALL_BYTES = 4_608  # the least that Linux gives a socket's buffer


class Gateway:
    """One that lends, and the process that borrows, on one loop."""

    def __init__(self, borrowed: Borrowed, path: Path, read: bytes) -> None:
        self.borrowed, self.read = borrowed, read
        self._path = path
        self._open: list[socket.socket] = []
        self.channel = self.connect()

    def connect(self) -> socket.socket:
        """Another gateway's channel."""
        channel = socket.socket(socket.AF_UNIX)
        channel.connect(str(self._path))
        channel.setblocking(False)
        self._open.append(channel)
        return channel

    def close(self) -> None:
        """Close every channel."""
        for channel in self._open:
            channel.close()

    async def lend(self, times: int = 0) -> socket.socket:
        """A client's end of a connection that is lent."""
        client, lent = socket.socketpair()
        client.setblocking(False)
        lent.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_BYTES)
        before = len(self.borrowed.connections)
        socket.send_fds(self.channel, [bytes([times])], [lent.fileno()])
        lent.close()
        await until(lambda: len(self.borrowed.connections) > before)
        return client

    async def returned(self) -> tuple[int, socket.socket]:
        """What comes back, and how often it was lent."""
        await asyncio.wait_for(_readable(self.channel), 60)
        said, descriptors, _, _ = socket.recv_fds(self.channel, 1, 1)
        return said[0], socket.socket(fileno=descriptors[0])


async def _readable(one: socket.socket) -> None:
    ready, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(one, ready.set)
    await ready.wait()
    loop.remove_reader(one)


def converse(server: Server, tenant: Tenant, place: Path, scenario: Scenario, answered: list[int]) -> None:
    """Play the scenario with a customer of forty balances."""
    for _ in range(40):
        tenant.meter()
    tenant.customer(external_id="ann")
    tenant.send(line("a"))
    head = "GET /v1/customer-meters/?external_customer_id=ann&limit=100 HTTP/1.1\r\nhost: t\r\n"
    read = f"{head}authorization: Bearer {tenant.secret}\r\n\r\n".encode()

    async def play() -> None:
        borrowed = Borrowed(AtOnce(server.app.state.desk), list, lambda: answered.append(1))
        borrowed.listen(place / "lend.sock")
        gateway = Gateway(borrowed, place / "lend.sock", read)
        with contextlib.closing(gateway), contextlib.closing(borrowed):
            await scenario(gateway)

    server.run(play())


@pytest.fixture
def play(server: Server, tmp_path: Path) -> Callable[[Scenario], list[int]]:
    """Play a scenario; an entry for each answer that was given."""

    def playing(scenario: Scenario) -> list[int]:
        answered: list[int] = []
        converse(server, server.tenant(), tmp_path, scenario, answered)
        return answered

    return playing


def test_an_answer_waits_for_a_client_that_reads_slowly(play: Callable[[Scenario], list[int]]) -> None:
    """Larger than what the socket takes at once; what follows is answered after it."""

    async def scenario(gateway: Gateway) -> None:
        loop = asyncio.get_running_loop()
        client = await gateway.lend()
        await loop.sock_sendall(client, gateway.read)
        await until(lambda: any(one._unsent for one in gateway.borrowed.connections))
        await loop.sock_sendall(client, gateway.read)
        found = b""
        while _whole(found) < 2:
            found += await loop.sock_recv(client, 1000)
        client.close()

    assert len(play(scenario)) == 2


def _whole(data: bytes) -> int:
    """Answers that are in the data as a whole."""
    count = 0
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]) if end else 0
        if not end or len(rest) < length:
            return count
        count, data = count + 1, rest[length:]
    return count


def test_a_client_that_never_reads_is_cut(
    play: Callable[[Scenario], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its answer, which then is no whole one."""
    monkeypatch.setattr(module, "UNREAD_S", 0.0)
    monkeypatch.setattr(module, "SWEEP_S", 0.01)

    async def scenario(gateway: Gateway) -> None:
        client = await gateway.lend()
        await asyncio.get_running_loop().sock_sendall(client, gateway.read)
        await until(lambda: not gateway.borrowed.connections)
        found = await asyncio.get_running_loop().sock_recv(client, 1_000_000)
        assert found.startswith(b"HTTP/1.1 200 OK")
        assert _whole(found) == 0
        with pytest.raises(BlockingIOError):
            gateway.channel.recv(1)
        client.close()

    play(scenario)


def test_a_connection_comes_back_counted_and_with_all_its_bytes(play: Callable[[Scenario], list[int]]) -> None:
    """Half a request, read to the last byte by whoever gets it back."""

    async def scenario(gateway: Gateway) -> None:
        client = await gateway.lend(times=3)
        await asyncio.get_running_loop().sock_sendall(client, gateway.read[:-1])
        times, back = await gateway.returned()
        assert (times, back.recv(10_000)) == (4, gateway.read[:-1])
        assert not gateway.borrowed.connections
        client.close()
        back.close()

    assert play(scenario) == []


def test_beyond_its_number_connections_come_back_at_once(
    play: Callable[[Scenario], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway answers those."""
    monkeypatch.setattr(module, "CONNECTIONS_MAX", 1)

    async def scenario(gateway: Gateway) -> None:
        first = await gateway.lend()
        second, lent = socket.socketpair()
        socket.send_fds(gateway.channel, [b"\0"], [lent.fileno()])
        times, back = await gateway.returned()
        assert times == 1
        assert len(gateway.borrowed.connections) == 1
        for one in (first, second, lent, back):
            one.close()

    play(scenario)


def test_a_gateway_that_ends_takes_its_own_connections_along(play: Callable[[Scenario], list[int]]) -> None:
    """Not those of another."""

    async def scenario(gateway: Gateway) -> None:
        mine, other = await gateway.lend(), gateway.connect()
        gateway.channel, ended = other, gateway.channel
        theirs = await gateway.lend()
        ended.close()
        assert await asyncio.get_running_loop().sock_recv(mine, 1) == b""
        assert len(gateway.borrowed.connections) == 1
        mine.close()
        theirs.close()

    play(scenario)


def test_a_stop_gives_everything_back(play: Callable[[Scenario], list[int]]) -> None:
    """Also what was lent and not looked at yet; a gateway that comes too late lends nothing."""

    async def scenario(gateway: Gateway) -> None:
        held = await gateway.lend()
        late, lent = socket.socketpair()
        socket.send_fds(gateway.channel, [b"\0"], [lent.fileno()])
        gateway.borrowed.close()
        clients = {b"a": held, b"b": late}
        for said, client in clients.items():
            client.send(said)
        back = [(await gateway.returned())[1] for _ in clients]
        assert {one.recv(10) for one in back} == set(clients)
        with pytest.raises(BrokenPipeError):
            socket.send_fds(gateway.channel, [b"\0"], [lent.fileno()])
        for one in (held, late, lent, *back):
            one.close()

    play(scenario)


def test_a_read_that_fails_is_left_to_the_gateway(
    play: Callable[[Scenario], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was: the bytes are still in the connection, which must not be looked at for ever."""
    monkeypatch.setattr(AtOnce, "answer", None)

    async def scenario(gateway: Gateway) -> None:
        client = await gateway.lend()
        client.send(gateway.read)
        _, back = await gateway.returned()
        assert back.recv(10_000) == gateway.read
        client.close()
        back.close()

    assert play(scenario) == []
