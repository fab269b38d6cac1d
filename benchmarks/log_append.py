"""How fast does the embedded log take events, and give them back?

Each row is a number of tasks that append values one after another, each waiting for its offset, as requests do.
Beside it, in the same run and on the same disk, the machine's limit: one file, written and synced once per group of
the same size, which is as fast as anything durable can be. Reading is timed over what was written.

    python -m benchmarks.log_append [--seconds 3] [--busy] [--directory DIR]

``--busy`` runs a thread of plain Python beside, as a process that also decodes and answers has.
"""

import argparse
import asyncio
import os
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.report import Report
from ingest.log import open_log
from meters.log import USAGE_EVENTS, Entry, Log

EVENT_BYTES = 300
ORGANIZATION = "6f8b1f9e-0f4e-4b8e-9a53-3f6f4f1d2c10"
# events per value, tasks that append
SHAPES = [(1, 1), (1, 64), (1, 256), (100, 1), (100, 32), (1000, 8)]
READ_BYTES = 8 << 20


def cpu_s() -> float:
    """Processor time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def value(events: int) -> bytes:
    """So many lines of ``EVENT_BYTES`` bytes."""
    return b"\n".join([b"x" * (EVENT_BYTES - 1)] * events)


async def append_for(log: Log, events: int, tasks: int, seconds: float) -> list[float]:
    """Append from so many tasks for so long; every latency in seconds."""
    latencies: list[float] = []
    until = time.perf_counter() + seconds
    entry = Entry(value(events), organization_id=ORGANIZATION, admitted=True)

    async def appender() -> None:
        while (begun := time.perf_counter()) < until:
            await log.append(USAGE_EVENTS, [entry])
            latencies.append(time.perf_counter() - begun)

    async with asyncio.TaskGroup() as group:
        for _ in range(tasks):
            group.create_task(appender())
    return sorted(latencies)


def read_all(log: Log, events: int, appended: int) -> float:
    """Events per second of a reader from the first record to the last, which is as many as were appended."""
    position, records, begun = 0, 0, time.perf_counter()
    while found := log.read(USAGE_EVENTS, {0: position}, bytes_max=READ_BYTES):
        position += len(found)
        records += len(found)
    assert records == appended, f"{appended} were appended, {records} are read"
    return records * events / (time.perf_counter() - begun)


def baseline(path: Path, size: int, group: int, seconds: float) -> float:
    """Values per second when a group of them is written to a file and synced, and nothing else."""
    block = bytes(size * group)
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    groups, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        os.write(descriptor, block)
        os.fdatasync(descriptor)
        groups += 1
    elapsed = time.perf_counter() - begun
    os.close(descriptor)
    path.unlink()
    return groups * group / elapsed


@contextmanager
def busy_thread(wanted: bool) -> Iterator[None]:
    """A thread that computes in short bursts until the block ends."""
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=compute)
    if wanted:
        thread.start()
    yield
    stop.set()
    if wanted:
        thread.join()


def measure(directory: Path, events: int, tasks: int, seconds: float, busy: bool) -> dict[str, float]:
    """One row of the table."""
    size = len(value(events))
    log = open_log(str(directory / f"{events}-{tasks}"))
    with busy_thread(busy):
        cpu, begun = cpu_s(), time.perf_counter()
        latencies = asyncio.run(append_for(log, events, tasks, seconds))
        elapsed, cpu = time.perf_counter() - begun, cpu_s() - cpu
        reading = read_all(log, events, len(latencies))
    log.close()
    raw = baseline(directory / "raw", size, tasks, seconds / 3)
    middle, high = latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
    count = len(latencies)
    return {
        "events a value": events, "tasks": tasks, "appends/s": count / elapsed, "events/s": count * events / elapsed,
        "p50 ms": middle * 1e3, "p99 ms": high * 1e3, "CPU us/event": 1e6 * cpu / count / events,
        "file and sync events/s": raw * events, "of that": count / elapsed / raw, "read events/s": reading,
    }  # fmt: skip


def main() -> None:
    """Run and report; fails when a value that was appended is not read back."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--directory", type=Path, default=None, help="on which disk")
    arguments = parser.parse_args()
    report = Report("log_append", "the embedded log's appends beside a plain file that is written and synced")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        for events, tasks in SHAPES:
            report.add(**measure(Path(directory), events, tasks, arguments.seconds, arguments.busy))
    report.finish()


if __name__ == "__main__":
    main()
