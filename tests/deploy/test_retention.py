"""The log forgets what is old enough and counted, and nothing else."""

import asyncio
from pathlib import Path

from deploy.server.aggregate import DAY_US, trimming
from ingest.log import open_log
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry


def test_only_what_is_old_and_read_leaves_the_log(tmp_path: Path) -> None:
    """Records beyond the bound go once the store has them; before that none of them does."""
    now_us = 0
    log = open_log(str(tmp_path), clock_us=lambda: now_us)
    for day in range(4):
        now_us = day * DAY_US
        asyncio.run(log.append(USAGE_EVENTS, [Entry(b"{}")]))
    trim = trimming(log, 2, lambda: now_us)

    trim({0: 0})
    assert log.starts(USAGE_EVENTS) == {0: 0}
    trim({0: 4})
    assert log.starts(USAGE_EVENTS) == {0: 1}
    assert log.ends(USAGE_EVENTS) == {0: 4}
    log.close()


def test_no_partition_answers_for_another(tmp_path: Path) -> None:
    """While one has old records that were not read, nothing goes, whatever the others have to read."""
    now_us = 0
    log = open_log(str(tmp_path), partitions={USAGE_EVENTS: 2, USAGE_CONTROL: 1}, clock_us=lambda: now_us)
    for day in range(4):
        now_us = day * DAY_US
        asyncio.run(log.append(USAGE_EVENTS, [Entry(b"{}", partition) for partition in (0, 1)]))
    trim = trimming(log, 2, lambda: now_us)

    for _ in range(2):  # whichever has its turn
        trim({0: 3, 1: 0})
        assert log.starts(USAGE_EVENTS) == {0: 0, 1: 0}
    trim({0: 3, 1: 1})
    assert log.starts(USAGE_EVENTS) == {0: 1, 1: 1}
    log.close()
