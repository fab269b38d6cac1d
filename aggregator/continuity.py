"""Whether a log is still the one that a store was counted from.

A log has an identity, and a position past its end is refused. Neither tells of a log that was restored from an older
copy and written on: it has the same name, and other records under numbers that the store counted already. Those would
never be counted. So the last record that was read of each partition is looked at again: the log must still give it the
same time.
"""

from aggregator.store.store import Store
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log


def break_in(log: Log, store: Store) -> str | None:
    """What is wrong, or None. Raises PositionLost when the log ends before what was counted, TryAgain."""
    for stream in (USAGE_EVENTS, USAGE_CONTROL):
        starts = log.starts(stream)
        for partition, (offset, last_us) in store.last_read(stream).items():
            if offset < starts.get(partition, 0):
                continue  # retention removed it
            records = log.read(stream, {partition: offset}, bytes_max=1)
            if not records or records[0].timestamp_us != last_us:
                where = f"{stream} partition {partition} has another record {offset} than the one that was counted"
                return f"{where}: the log was restored from an older copy and written on"
    return None
