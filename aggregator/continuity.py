"""Whether a log is still the one that a store was counted from.

A log has an identity, and a position past its end is refused. Neither tells of a log that was restored from an older
copy and written on: it has the same name, and other records under numbers that the store counted already. Those would
never be counted. So the newest event of each partition is compared with the record it came from, by the time the log
gave to both.
"""

from aggregator.store.store import Store
from meters.log import USAGE_EVENTS, Log


def break_in(log: Log, store: Store) -> str | None:
    """What is wrong, or None. Raises PositionLost when the log ends before what was counted, TryAgain."""
    starts = log.starts(USAGE_EVENTS)
    for partition, (offset, ingested_us) in store.newest().items():
        if offset < starts.get(partition, 0):
            continue  # retention removed it; what came after it was never counted as an event
        records = log.read(USAGE_EVENTS, {partition: offset}, bytes_max=1)
        if not records or records[0].timestamp_us != ingested_us:
            where = f"{USAGE_EVENTS} partition {partition} has another record {offset} than the one that was counted"
            return f"{where}: the log was restored from an older copy and written on"
    return None
