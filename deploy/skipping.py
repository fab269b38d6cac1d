"""``meterstream skip-lost``: accept that records which left the log before they were read will never be counted."""

import contextlib

from aggregator.store.opening import NotNow, Unopenable, explaining
from aggregator.store.skipping import Lost, find_lost, skip
from aggregator.store.store import Store, prepare_partitions
from deploy.data import DataDirectory
from deploy.giving_up import GiveUp
from deploy.private import private_files
from meters.log import USAGE_CONTROL, USAGE_EVENTS, TryAgain


def skip_lost(data: DataDirectory, *, sure: bool) -> list[Lost]:
    """What is lost; skipped if ``sure``.

    Raises GiveUp while a server runs, where there is no store that could lack anything, and for decisions, which are
    needed.
    """
    data.require()
    data.require_store()
    with data.hold("skip records"), private_files(), contextlib.closing(data.open_log()) as log:
        try:
            streams = (USAGE_EVENTS, USAGE_CONTROL)
            identities = {stream: log.identity(stream) for stream in streams}
            with contextlib.closing(Store.open(data.store, identities)) as store, explaining(data.store):
                for stream in streams:
                    prepare_partitions(store, stream, list(log.ends(stream)))
                if find_lost(store, USAGE_CONTROL, log.starts(USAGE_CONTROL)):
                    raise GiveUp(
                        "decisions left the log (tokens, customers, meters); restore it from a backup, as "
                        "ingest/log/README.md says"
                    )
                lost = find_lost(store, USAGE_EVENTS, log.starts(USAGE_EVENTS))
                if sure and lost:
                    skip(store, lost)
                return lost
        except (Unopenable, NotNow, TryAgain) as error:
            raise GiveUp(f"{error}") from error
