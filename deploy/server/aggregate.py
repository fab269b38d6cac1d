"""The aggregator's process: opens the log and the store, serves the API, and trims the log.

``run`` wires ``aggregator.process``. The API listens on a socket in the data directory, for the gateway beside it, or
on a host and port if the log is shared with gateways on other machines.

By default the log keeps all records, so that the store can always be rebuilt. ``trimming`` implements the retention:
records older than a number of days are removed, but never a record that the store has not read. The numbers in the
store stay. A later rebuild would have only the remaining records, so ``meterstream rebuild`` refuses then.
"""

import contextlib
from collections.abc import Callable, Mapping

import structlog

from aggregator.process import Process
from aggregator.process import run as run_aggregator
from aggregator.store.database import Unopenable
from aggregator.store.store import Replaced
from deploy.errors import GiveUp
from deploy.server.data import DataDirectory, data_directory
from deploy.server.runtime import bind, configure_logs, leave_when_asked, live_no_longer_than_supervisor, url
from deploy.settings import Settings
from ingest.log import clock_us
from meters.log import USAGE_EVENTS, Log, PositionLost, TryAgain

DAY_US = 24 * 60 * 60 * 1_000_000

logger = structlog.get_logger("deploy")


def run(settings: Settings, lifeline: int | None) -> None:
    """Serve until SIGTERM. Raises GiveUp where a restart would not help."""
    leave_when_asked()
    if lifeline is not None:
        live_no_longer_than_supervisor(lifeline)
    configure_logs("aggregator", settings.log_level)
    data = data_directory(settings)
    # A supervisor holds the directory for its children; without one the aggregator does, against a rebuild.
    with data.hold("aggregate") if lifeline is None else contextlib.nullcontext():
        _serve(data, settings, alone=lifeline is None)


def _serve(data: DataDirectory, settings: Settings, *, alone: bool) -> None:
    # First of all, so that an address that is taken is said before anything is made. Its gateways are elsewhere.
    listener = bind(settings.host, settings.port) if alone and not data.has_log else None
    log = data.open_log()
    try:
        days = settings.retention_days if data.has_log else 0  # brokers see to their own
        process = Process(store=data.store, housekeeping=trimming(log, days, clock_us) if days else None)
        if listener is not None:
            process = process._replace(listener=listener)
        else:
            data.socket.unlink(missing_ok=True)  # left over from a process that was killed
            process = process._replace(socket=data.socket)
        process = process._replace(
            forwarding=data.forwarding, private_targets=settings.webhook_private_targets,
            on_listening=_say_where if alone else None,
        )  # fmt: skip
        run_aggregator(log, process)
    except (Unopenable, Replaced) as error:
        raise GiveUp(f"{data.healing(str(error))}; `meterstream doctor --data {data.path}` looks closer") from error
    except PositionLost as error:
        raise GiveUp(
            f"the log and the store do not belong together any more: {error}; stop here, keep both, and see "
            f"`meterstream doctor --data {data.path}`"
        ) from error
    finally:
        log.close()


def trimming(log: Log, days: int, clock_us: Callable[[], int]) -> Callable[[Mapping[int, int]], None]:
    """What to do now and then, given the positions up to which everything is in the store."""

    def trim(as_of: Mapping[int, int]) -> None:
        oldest_kept_us = clock_us() - days * DAY_US
        try:
            for place in as_of.items():  # one by one: a read of all ends at the first record, whosever it is
                unread = log.read(USAGE_EVENTS, dict([place]), bytes_max=1)
                if any(record.timestamp_us < oldest_kept_us for record in unread):
                    return  # the store is that far behind: it reads first
            removed = log.trim(USAGE_EVENTS, oldest_kept_us)
        except TryAgain as error:
            logger.warning("log_not_trimmed", reason=str(error))
            return
        if removed:
            logger.info("log_trimmed", records=removed, days=days)

    return trim


def _say_where(address: tuple[str, int] | str) -> None:
    name = f"unix:{address}" if isinstance(address, str) else url(*address[:2])
    structlog.get_logger("deploy.aggregate").info("listening", url=name)
