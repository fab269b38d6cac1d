"""Where a process listens: a socket, and its address as a person types it."""

import socket

from deploy.giving_up import USAGE, GiveUp

BACKLOG = 2048  # connections that wait while a gateway is replaced, as many as uvicorn would let wait


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises GiveUp with what to do."""
    listener = bind(host, port)
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _taken(host, port, error) from None
    return listener


def bind(host: str, port: int) -> socket.socket:
    """A socket that will listen, and turns everybody away until then. Raises GiveUp with what to do."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise GiveUp(f"--host {host}: {error.strerror}", USAGE) from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _taken(host, port, error) from None
    return listener


def _taken(host: str, port: int, error: OSError) -> GiveUp:
    what = f"cannot listen on {host} port {port}: {error.strerror}"
    return GiveUp(f"{what}; choose another with --port (0 takes a free one)")


def url(host: str, port: int) -> str:
    """What to call whoever listens there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
