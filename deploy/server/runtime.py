"""What every server process needs: signals and lifeline, sockets, and JSON logs.

``leave_when_asked`` ends the process on a signal and
``live_no_longer_than_supervisor`` with its supervisor. ``listen`` and ``bind`` open sockets. ``configure_logs`` sets
up structlog.
"""

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from structlog.typing import EventDict, Processor

from deploy.errors import BUG, DONE, FAILED, USAGE, GiveUp

# The end of a process. The lifeline is a pipe whose other end closes with the supervisor; this works everywhere. On
# Linux the kernel's own signal is faster, and reaches a child that hangs. Leaving at once is safe, because every part
# is built to be killed.

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def live_no_longer_than_supervisor(lifeline: int) -> None:
    """End this process when the other end of the pipe is closed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_await_end, args=(lifeline,), name="lifeline", daemon=True).start()


def leave_when_asked() -> None:
    """Let SIGTERM, SIGINT and SIGHUP end the process through its ``finally`` clauses, with exit code 0.

    A server takes the first two over while it runs and raises them again when it has stopped. A terminal that goes away
    is as good as SIGTERM, but not under nohup.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


def _leave(*_: object) -> None:
    raise SystemExit(DONE)


def _await_end(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns only when nobody can write any more
    os._exit(FAILED)


# Sockets, and their address as a person types it.

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


# Logs: one JSON object a line on stderr, from our code and from libraries. Values with the name of a secret are
# removed. What a person should read on a terminal is printed by the commands.

ROOMS = ("aggregator", "deploy", "ingest")
SECRET_KEYS = frozenset({"token", "secret", "authorization", "password"})


def configure_logs(process: str, level: str) -> None:
    """Set up logging for this process; ``process`` is added to every line."""

    def name_process(_: object, __: str, event: EventDict) -> EventDict:
        return {**event, "process": process}

    chain: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        name_process,
        hide_secrets,
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=chain,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    # Libraries are heard when something is wrong; our own rooms as the setting says.
    logging.basicConfig(level=max(logging.WARNING, logging.getLevelName(level.upper())), handlers=[handler], force=True)
    for room in ROOMS:
        logging.getLogger(room).setLevel(level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *chain,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


@contextmanager
def crashes_logged() -> Iterator[None]:
    """Log what should not happen with its traceback, and leave; the supervisor starts the process again."""
    try:
        yield
    except GiveUp:
        raise  # explains itself in one line
    except Exception:
        structlog.get_logger().exception("crashed")
        raise SystemExit(BUG) from None


def hide_secrets(_: object, __: str, event: EventDict) -> EventDict:
    """Take out what is secret by its name."""
    return {name: "***" if name.lower() in SECRET_KEYS else value for name, value in event.items()}
