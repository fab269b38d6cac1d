"""The aggregator's process: the log and the store of a data directory, the API on its socket."""

import contextlib

from aggregator.process import Process
from aggregator.process import run as run_aggregator
from aggregator.store.opening import Unopenable
from aggregator.store.store import Replaced
from deploy.data import DataDirectory
from deploy.giving_up import GiveUp
from deploy.lifeline import leave_when_asked, live_no_longer_than_supervisor
from deploy.logs import configure_logs
from deploy.retention import trimming
from deploy.settings import Settings
from ingest.log import clock_us
from meters.log import PositionLost


def run(settings: Settings, lifeline: int | None) -> None:
    """Serve until SIGTERM. Raises GiveUp where a restart would not help."""
    leave_when_asked()
    if lifeline is not None:
        live_no_longer_than_supervisor(lifeline)
    configure_logs("aggregator", settings.log_level)
    data = DataDirectory(settings.data)
    # A supervisor holds the directory for its children; without one the aggregator does, against a rebuild.
    with data.hold("aggregate") if lifeline is None else contextlib.nullcontext():
        _serve(data, settings.retention_days)


def _serve(data: DataDirectory, retention_days: int) -> None:
    data.socket.unlink(missing_ok=True)  # left over from a process that was killed
    log = data.open_log()
    try:
        housekeeping = trimming(log, retention_days, clock_us) if retention_days else None
        run_aggregator(log, Process(store=data.store, socket=data.socket, housekeeping=housekeeping))
    except (Unopenable, Replaced) as error:
        raise GiveUp(f"{error}; `meterstream doctor --data {data.path}` looks closer") from error
    except PositionLost as error:
        raise GiveUp(
            f"the log and the store do not belong together any more: {error}; stop here, keep both, and see "
            f"`meterstream doctor --data {data.path}`"
        ) from error
    finally:
        log.close()
