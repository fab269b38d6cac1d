"""What another process does: appends numbered values from several tasks, and prints what it was told.

    python -m tests.contracts.appending_process URL NAME COUNT
"""

import asyncio
import json
import sys

from ingest.log import open_log
from meters.log import USAGE_EVENTS, Entry, Log


async def append_all(log: Log, name: str, count: int) -> list[tuple[str, int, int]]:
    """Each value with its partition and offset."""

    async def one(number: int) -> tuple[str, int, int]:
        value = f"{name}-{number}"
        [offset] = await log.append(USAGE_EVENTS, [Entry(value.encode(), partition=number % 2)])
        return value, number % 2, offset

    return await asyncio.gather(*[one(number) for number in range(count)])


if __name__ == "__main__":
    opened = open_log(sys.argv[1])
    print(json.dumps(asyncio.run(append_all(opened, sys.argv[2], int(sys.argv[3])))))
    opened.close()
