"""The gateway's server: uvicorn with its fast parser, and deadlines for slow clients.

``run`` serves the application on the given sockets with ``GatewayServer``, whose connections are
``ingest.gateway.connection.GatewayProtocol``. Once a second a sweep looks at all connections and cuts those that are
late with a head, with a body, or with reading an answer. Beyond a number of connections, new ones are told to come
back later.
"""

import asyncio
import resource
import socket
import sys
from collections.abc import Sequence
from typing import Any

import uvicorn

from ingest import metrics, responses
from ingest.gateway.app import Gateway, GatewaySettings
from ingest.gateway.connection import GatewayProtocol
from ingest.gateway.proxy import Relay
from ingest.limits import CONNECTIONS_MAX, HEAD_DEADLINE_S, IDLE_DEADLINE_S, SHUTDOWN_DEADLINE_S, WRITE_DEADLINE_S
from meters.log import Log

# The log's thread needs the interpreter lock several times for each commit, and gets it only at the end of a switch
# interval. Beside 50,000 events/s the slowest percent of answers took 18 to 24 ms with Python's 5 ms, and 11 to 16
# with this.
SWITCH_INTERVAL_S = 0.0005
SWEEP_TICKS = 10  # uvicorn ticks ten times a second
DESCRIPTORS_SPARE = 256  # for the log, the query API, and what Python opens


class ServerSettings(GatewaySettings, frozen=True, kw_only=True):
    """The same, and where the process listens."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0 takes any free one
    head_deadline_s: float = HEAD_DEADLINE_S
    write_deadline_s: float = WRITE_DEADLINE_S
    idle_deadline_s: int = IDLE_DEADLINE_S
    connections_max: int = CONNECTIONS_MAX


class GatewayServer(uvicorn.Server):
    """uvicorn around a gateway, sweeping its connections."""

    def __init__(self, gateway: Gateway, settings: ServerSettings) -> None:
        self.relay = reads = Relay(gateway.upstream, is_open=not settings.requests_per_minute)

        class Limited(GatewayProtocol):
            connections_max = settings.connections_max
            endpoint = gateway.endpoint
            relay = reads

        self._settings = settings
        self._gateway = gateway
        super().__init__(
            uvicorn.Config(
                gateway,
                host=settings.host,
                port=settings.port,
                http=Limited,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=settings.idle_deadline_s,
                timeout_graceful_shutdown=SHUTDOWN_DEADLINE_S,
            )
        )

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: uvicorn's own business, and whether to stop; once a second: the sweep."""
        if counter % SWEEP_TICKS == 0:
            self.sweep(asyncio.get_running_loop().time())
        return await super().on_tick(counter) or self._gateway.failure is not None

    def sweep(self, now_s: float) -> None:
        """Cut every connection that has been late for too long."""
        connections: set[Any] = self.server_state.connections
        metrics.CONNECTIONS.set(len(connections))
        for connection in list(connections):
            if connection.blocked_since_s is None and connection.transport.is_closing():
                connection.blocked_since_s = now_s  # it ends with what is left to write, however little that is
            if _late(connection.blocked_since_s, self._settings.write_deadline_s, now_s):
                connection.abandon()
            elif _late(connection.head_since_s, self._settings.head_deadline_s, now_s):
                connection.cut("head", responses.timed_out())
            elif _late(connection.body_since_s, self._settings.body_deadline_s, now_s):
                connection.body_late()
            elif _late(connection.unread_since_s, self._settings.body_deadline_s, now_s):
                connection.cut("body")
            elif _late(connection.idle_since_s, self._settings.idle_deadline_s, now_s):
                connection.timeout_keep_alive_handler()


def _late(since_s: float | None, deadline_s: float, now_s: float) -> bool:
    return since_s is not None and now_s - since_s > deadline_s


def run(log: Log, settings: ServerSettings, sockets: Sequence[socket.socket] | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then finish what was begun. The caller opened ``log``, and closes it after.

    ``sockets`` are listening sockets to use instead of the host and port. What ends a background task stops the server
    in the same way and is raised then: whoever watches over the process can start another.
    """
    _allow_descriptors(settings.connections_max + DESCRIPTORS_SPARE)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gateway = Gateway(log, settings)
    GatewayServer(gateway, settings).run(list(sockets) if sockets else None)
    if gateway.failure is not None:
        raise gateway.failure


def _allow_descriptors(count: int) -> None:
    """Raise the process's own limit on open files as far as it may; many systems start at 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
