"""Ports on loopback for servers that have to know theirs before they start, or keep it over a restart.

A port that was only found free can be gone a moment later: the system gives it to an outgoing connection, and the
server does not start. A bound socket that does not listen keeps a port from that, and lets every server have it that
sets SO_REUSEADDR as this one does: Java's, asyncio's, uvicorn's.
"""

import socket

_held: list[socket.socket] = []


def take_port() -> int:
    """A port on which nobody listens, and which is given to nobody else while this process lives."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    port: int = holder.getsockname()[1]
    return port
