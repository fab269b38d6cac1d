"""An endpoint that webhooks are sent to: a real HTTP server on this machine that does as it is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

from aggregator.webhooks.sender import Pace, Sender
from tests.support.servers.query_api import Json, Server, exact_text

HURRY = Pace(tick_s=0.01, collect_s=0.02, attempts_max=3, backoff_s=0.02, settle_s=0.0)


class Delivery(NamedTuple):
    """A request that came."""

    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> Json:
        """The body, read."""
        return exact_text(self.body)


class Receiver:
    """``answers`` are the status codes of the next deliveries, then 200 for ever. None: no answer at all.

    A delivery with the text ``refused`` in it is answered with 500. Every answer sets a cookie.
    """

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.answers: list[int | None] = []
        self.refused: bytes | None = None
        self.url = ""

    def types(self) -> list[str]:
        """What came, by type."""
        return [delivery.event["type"] for delivery in self.deliveries]

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head)}
            body = await reader.readexactly(int(headers["content-length"]))
            self.deliveries.append(Delivery(headers, body))
            status = self.answers.pop(0) if self.answers else 200
            if self.refused is not None and self.refused in body:
                status = 500
            if status is None:
                await reader.read()
            else:
                location = b"location: http://127.0.0.1:1/elsewhere\r\n" if status == 307 else b""
                more = location + b"set-cookie: whose=mine\r\n"
                writer.write(b"HTTP/1.1 %d Told\r\n%scontent-length: 0\r\n\r\n" % (status, more))
                await writer.drain()
        writer.close()


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """A receiver for as long as the block lasts."""
    receiver = Receiver()
    server = await asyncio.start_server(receiver.take, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    receiver.url = f"http://127.0.0.1:{port}/hook"
    try:
        yield receiver
    finally:
        server.close()


@asynccontextmanager
async def sending(server: Server, **settings: Any) -> AsyncIterator[Sender]:
    """The sender of webhooks, at work."""
    sender = Sender(server.app.state.desk, **{"pace": HURRY, "private_allowed": True, **settings})
    running = asyncio.create_task(sender.run())
    try:
        yield sender
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
