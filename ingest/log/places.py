"""Which streams a log has, with how many partitions each, and what is refused for ever."""

from collections.abc import Iterable, Mapping, Sequence

from ingest.log.limits import Limits
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Refused

# One partition keeps every order there is; more of them help readers only when there are several readers.
PARTITIONS: Mapping[str, int] = {USAGE_EVENTS: 1, USAGE_CONTROL: 1}


class Places:
    """The partitions by stream, and the questions asked before anything is done with them."""

    def __init__(self, partitions: Mapping[str, int]) -> None:
        self.partitions = dict(partitions)
        self._turn = 0

    def of(self, stream: str) -> range:
        """The partitions of the stream. Raises Refused if there is no such stream."""
        if stream not in self.partitions:
            raise Refused(f"no stream {stream!r}")
        return range(self.partitions[stream])

    def check(self, stream: str, partition: int) -> None:
        """Raises Refused if there is no such partition."""
        if partition not in self.of(stream):
            raise Refused(f"{stream} has no partition {partition}")

    def in_turn(self, stream: str, partitions: Iterable[int]) -> list[int]:
        """The partitions, another one first each time, so that a busy one cannot starve the rest. Raises Refused."""
        chosen = sorted(partitions)
        for partition in chosen:
            self.check(stream, partition)
        self._turn += 1
        first = self._turn % max(1, len(chosen))
        return chosen[first:] + chosen[:first]

    def check_entries(self, stream: str, entries: Sequence[Entry], limits: Limits) -> None:
        """Raises Refused if one of the entries, or all together, can never be taken."""
        for entry in entries:
            self.check(stream, entry.partition)
            if len(entry.value) > limits.value_bytes_max:
                raise Refused(f"a value of {len(entry.value)} bytes is over {limits.value_bytes_max}")
        if len(entries) > 1 and sum(len(entry.value) for entry in entries) > limits.queue_bytes_max:
            raise Refused(f"the entries are over {limits.queue_bytes_max} bytes together")
