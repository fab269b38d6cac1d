"""Connections on which only reads come, lent to the process that knows the answers.

A read that the query API answers from memory costs it less than the hop through the gateway, and beside a stream of
events each of the two processes waits for a core of its own. So a connection that asked for nothing else for a while
is handed over as it is, as a descriptor, between two requests, when nothing of it is in this process any more. The
query API answers what it can answer at once and hands the connection back before anything else, unread: another
request, half a head, silence. All that a gateway does and limits stays here.

The two talk over a unix socket, one connection for each gateway: a byte with a descriptor, in both directions. The byte
says how often the connection was lent, and each time it has to read twice as much before it is lent again: a
connection that carries reads and events by turns soon stays.

That the process beside is killed takes the connections with it that it has, and while it stands still so do they. Where
it is away, or has enough of them, nothing is lent, and reads go on through ``ingest.relay``.
"""

import asyncio
import os
import socket
from collections.abc import Callable

from ingest import telemetry

READS_BEFORE = 16
"""Reads in a row after which a connection is lent for the first time: it costs two of them, there and back."""

TIMES_MAX = 10
"""From here on the number of reads between two times grows no more: 16,000."""

CONNECT_AGAIN_S = 1.0
"""Between two attempts to reach the process beside; it restarts in about a second."""

TakeBack = Callable[[socket.socket, int], None]


def reads_before(times: int) -> int:
    """Reads in a row after which a connection is lent that was lent so often."""
    return READS_BEFORE << min(times, TIMES_MAX)


class Lender:
    """Lends to whoever listens at ``path``; nobody does where it is None. ``take_back`` gets what comes back."""

    def __init__(self, path: str | None, take_back: TakeBack) -> None:
        self._path = path
        self._take_back = take_back
        self._channel: socket.socket | None = None
        self._connect_from_s = 0.0

    def lend(self, descriptor: int, times: int) -> bool:
        """Hand over the connection, which was lent so often before; whether it was taken. The caller closes its own."""
        channel = self._channel or self._connect()
        if channel is None:
            return False
        try:
            socket.send_fds(channel, [bytes([min(times, TIMES_MAX)])], [descriptor])
        except OSError:  # it takes no more just now, or none any more: then the channel's end is behind what comes back
            return False
        telemetry.CONNECTIONS_LENT.inc()
        return True

    def close(self) -> None:
        """Let go of the socket; what is lent is closed by the other side."""
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel)
            self._channel.close()
            self._channel = None

    def _connect(self) -> socket.socket | None:
        loop = asyncio.get_running_loop()
        if self._path is None or loop.time() < self._connect_from_s:
            return None
        self._connect_from_s = loop.time() + CONNECT_AGAIN_S
        try:
            channel = socket.socket(socket.AF_UNIX)
        except OSError:
            return None
        try:
            channel.setblocking(False)
            channel.connect(self._path)  # on this machine it is there at once or not at all
        except OSError:
            channel.close()
            return None
        loop.add_reader(channel, self._hear)
        self._channel = channel
        return channel

    def _hear(self) -> None:
        """Take back all that was handed back: of a channel that broke nobody is told twice. Its end is the other's."""
        while self._channel is not None:
            try:
                said, descriptors, _, _ = socket.recv_fds(self._channel, 1, 1)
            except BlockingIOError:
                return
            except OSError:
                said, descriptors = b"", []
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
                connection = socket.socket(fileno=descriptor)
                connection.setblocking(False)
                self._take_back(connection, said[0])
            if not said:
                self.close()
