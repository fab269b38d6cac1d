"""Whether a log is still the one that a store was counted from.

A log has an identity, and a position past its end is refused. Neither tells of a log that was restored from an older
copy and written on: it has the same name, and other records under numbers that the store counted already. Those would
never be counted. So the last record that was read of each partition is looked at again: the log must still give it the
same time.
"""

from aggregator.store.store import Store
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Log

READ_BYTES_MAX = 1 << 20  # of one look at all partitions: to seek costs brokers more than what came since


def break_in(log: Log, store: Store) -> str | None:
    """What is wrong, or None. Raises PositionLost when the log ends before what was counted, TryAgain."""
    for stream in (USAGE_EVENTS, USAGE_CONTROL):
        starts = log.starts(stream)
        left = {
            partition: known
            for partition, known in store.last_read(stream).items()
            if known[0] >= starts.get(partition, 0)  # or retention removed it
        }
        while left:
            before = dict(left)
            asked = {partition: offset for partition, (offset, _) in left.items()}
            for record in log.read(stream, asked, bytes_max=READ_BYTES_MAX):
                known = left.pop(record.partition, None)  # of each partition the first one
                if known is not None and known != (record.offset, record.timestamp_us):
                    return _other(stream, record.partition, known[0])
            if left == before:
                partition, (offset, _) = next(iter(left.items()))
                return _other(stream, partition, offset)
    return None


def _other(stream: str, partition: int, offset: int) -> str:
    where = f"{stream} partition {partition} has another record {offset} than the one that was counted"
    return f"{where}: the log was restored from an older copy and written on"
