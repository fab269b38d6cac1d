"""The gateway's process: opens the log and serves HTTP. With its log on Kafka it needs no data directory.

``run`` configures logging and garbage collection, takes the supervisor's listening socket or opens one
(``_own_listener``), and calls ``ingest.gateway.server.run``.
"""

import gc
import os
import socket

import structlog

from deploy.errors import GiveUp
from deploy.server.data import data_directory
from deploy.server.runtime import configure_logs, leave_when_asked, listen, live_no_longer_than_supervisor, url
from deploy.settings import Settings
from ingest.catalogue_follower import Unfollowable
from ingest.gateway.server import ServerSettings
from ingest.gateway.server import run as run_server

# How many new objects start a garbage collection. A request makes hundreds of objects that are freed with its answer,
# and none of them is in a cycle; with Python's default of 700 an event cost about a tenth more CPU.
GARBAGE_THRESHOLD = 100_000

LOOK_CLOSER = (
    "bring that stream back if anything has it; a gateway that is started again reads the one there is, "
    "and `meterstream doctor` looks closer"
)

UPSTREAM_IS_GIVEN = "the aggregator is named with --upstream http://HOST:PORT (or METERSTREAM_UPSTREAM)"

NICENESS_BESIDE_AGGREGATOR = 5
"""Where both share a machine and want all of it, events are taken a little more slowly instead of being counted ever
later: at full speed 146,000 events/s with a freshness of 0.6 s at p99, instead of 152,000 with 2.4 s and growing."""


def run(settings: Settings, lifeline: int | None, listener: int | None) -> None:
    """Serve until SIGTERM, on the supervisor's listening socket or on one of its own. Raises GiveUp."""
    leave_when_asked()
    if lifeline is not None:
        live_no_longer_than_supervisor(lifeline)
        os.nice(NICENESS_BESIDE_AGGREGATOR)
    configure_logs("gateway", settings.log_level)
    data = data_directory(settings)
    if data.has_log:
        data.make()
    log = data.open_log()
    if not data.has_log and listener is None and not settings.upstream:
        structlog.get_logger("deploy.gateway").warning("reads_are_answered_503", until=UPSTREAM_IS_GIVEN)
    gc.freeze()  # what is loaded by now stays
    gc.set_threshold(GARBAGE_THRESHOLD, 50, 100)
    try:
        run_server(
            log,
            ServerSettings(
                host=settings.host,
                port=settings.port,
                upstream=settings.upstream or f"unix:{data.socket}",
                requests_per_minute=settings.requests_per_minute,
            ),
            [_own_listener(settings) if listener is None else socket.socket(fileno=listener)],
        )
    except Unfollowable as error:
        raise GiveUp(f"{error}; {LOOK_CLOSER}") from error
    finally:
        log.close()


def _own_listener(settings: Settings) -> socket.socket:
    listener = listen(settings.host, settings.port)
    structlog.get_logger("deploy.gateway").info("listening", url=url(settings.host, listener.getsockname()[1]))
    return listener
