"""The log: durable, ordered, and the only truth. ``open_log`` opens the kind that a URL names.

    embedded:DIR    one machine, one SQLite file DIR/log.sqlite; a plain path means the same
    memory:         this process only, for tests
    kafka://...     two topics of a Kafka cluster, see ``ingest.log.kafka_admin``

Each kind implements the port ``meters.log.Log``. Only the modules of the opened kind are loaded.
"""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ingest.log.memory import Disk, MemoryLog
from ingest.log.partitions import Limits
from ingest.log.sqlite_log import EmbeddedLog
from meters.log import Log

__all__ = ["Limits", "open_log"]

# At least two letters, so that a drive letter is a path.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):(.*)", re.DOTALL)


def clock_us() -> int:
    """Microseconds since 1970 UTC."""
    return time.time_ns() // 1000


def open_log(
    url: str,
    *,
    partitions: Mapping[str, int] | None = None,
    clock_us: Callable[[], int] = clock_us,
    limits: Limits | None = None,
    secrets: Mapping[str, str] | None = None,
) -> Log:
    """Open the log at the URL, and make it if it is not there.

    ``partitions`` are the number of partitions by stream; None takes what is there, or one each.
    ``clock_us`` gives the ingestion time. ``secrets`` are the passwords that a kafka URL needs and does not hold; its
    topics are never made here. Raises ValueError for an unknown URL; TryAgain; Refused when what is
    there has other partitions or is no log; PositionLost when it is damaged.
    """
    match = _SCHEME.fullmatch(url)
    scheme, rest = match.groups() if match else ("embedded", url)
    if scheme == "embedded" and rest:
        return EmbeddedLog(Path(rest), partitions, clock_us, limits or Limits())
    if scheme == "memory" and not rest:
        return MemoryLog(Disk(partitions), clock_us, limits or Limits())
    if scheme == "kafka":
        # Loaded where it is used: a tenth of a second and 20 MB that an embedded log does without.
        from ingest.log.kafka_admin import parse_address
        from ingest.log.kafka_log import KafkaLog

        return KafkaLog(parse_address(url, secrets or {}), partitions, clock_us, limits or Limits())
    raise ValueError(f"no log at {url!r}: expected embedded:DIRECTORY, memory: or kafka://HOST:PORT")
