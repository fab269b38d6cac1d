"""A TCP proxy that cuts connections: what was asked went through, the answer did not come back.

Bytes from the client reach the server untouched. While ``cut_next`` is above zero, an answer costs one of it: its
first bytes are read from the server, so the server has done what it was asked for, and thrown away with both
connections. A connection that is silenced stays open, and no answer comes through it any more. With a ``pause_s``
answers are slow: it comes after each chunk of them.
"""

import asyncio
import contextlib
import socket
import threading
from types import TracebackType


class CuttingProxy:
    """A context manager, in a thread of its own; ``port`` is where it listens.

    ``answers`` are those it saw and ``cut`` those of them that it took away; an answer is a chunk of bytes.
    """

    def __init__(self, target_port: int, port: int = 0) -> None:
        self._target_port = target_port
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port: int = self._socket.getsockname()[1]
        self.cut_next = 0
        self.pause_s = 0.0
        self.answers = 0
        self.cut = 0
        self._accepted = self._silent = 0  # connections: how many, and how many of the first of them
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="cutting proxy")

    def __enter__(self) -> "CuttingProxy":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def silence(self) -> None:
        """Every connection that there is now, like a firewall that forgot them; later ones are served."""
        self._silent = self._accepted

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._connections: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, sock=self._socket)
        await self._over.wait()
        server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        number, self._accepted = self._accepted, self._accepted + 1
        to_server = None
        with contextlib.suppress(OSError, asyncio.CancelledError):
            server, to_server = await asyncio.open_connection("127.0.0.1", self._target_port)
            ways = {
                asyncio.create_task(self._requests(client, to_server)),
                asyncio.create_task(self._answers(number, server, to_client)),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        for writer in (to_client, to_server):
            if writer is not None:
                writer.transport.abort()
        self._connections.discard(task)

    async def _requests(self, client: asyncio.StreamReader, to_server: asyncio.StreamWriter) -> None:
        while piece := await client.read(1 << 16):
            to_server.write(piece)
            await to_server.drain()

    async def _answers(self, number: int, server: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        while piece := await server.read(1 << 16):
            if number < self._silent:
                continue
            self.answers += 1
            if self.cut_next > 0:
                self.cut_next -= 1
                self.cut += 1
                return
            to_client.write(piece)
            await to_client.drain()
            await asyncio.sleep(self.pause_s)
