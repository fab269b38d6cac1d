"""What a long history and many customers cost: memory, ingestion, a chart, a restart, making the store again.

One server whose log grows to each of the sizes, with as many days and customers as given; the backlog is worked off by
the server itself. At each size it takes events at full speed over HTTP, then at half of that while a month of
quantities by the day is asked for again and again; then every process of it is killed and it is started again. At the
end the chart is computed once by plain SQL over the same rows, and the store is made again from the log. Every chart's
total is compared with the sum of what was written and acknowledged.

    python -m benchmarks.history [--sizes 1000000 10000000] [--customers 1000000] [--seconds 10]
"""

import argparse
import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import duckdb
import httpx
import numpy as np

from benchmarks.drain import entries, fill
from benchmarks.end_to_end import Phase, end_position, meters
from benchmarks.load import Bodies, Ledger
from benchmarks.report import Report
from benchmarks.server import START_TIMEOUT_S, Server
from deploy.rebuild import rebuild
from deploy.server.data import DataDirectory
from meters.catalogue.catalogue import OrganizationCreated, decode_changes
from meters.log import USAGE_CONTROL, USAGE_EVENTS, format_position

Answer = TypeVar("Answer")
DAYS = 28
MONTH = {"start_timestamp": "2026-03-01T00:00:00Z", "end_timestamp": "2026-03-31T00:00:00Z", "interval": "day"}
WRITTEN_RUN = 9000  # ids of the backlog; those of what is sent over HTTP begin with smaller numbers
READS = 40
SQL = """
SELECT date_trunc('day', timestamp), sum(CAST(metadata ->> 'tokens' AS DECIMAL(38, 12))) FROM events
WHERE timestamp >= '2026-03-01' AND timestamp < '2026-03-31' GROUP BY 1
"""


class History:
    """A server, and all that it was ever given."""

    def __init__(self, server: Server, customers: int) -> None:
        self._server = server
        self.ids = server.create_meters(meters())
        self._bodies = Bodies(WRITTEN_RUN, customers=customers)
        self.backlog, self.ledgers = Ledger(), list[Ledger]()

    @property
    def tokens(self) -> int:
        """The sum that the first meter must show."""
        return sum(ledger.tokens for ledger in (self.backlog, *self.ledgers))

    @property
    def events(self) -> int:
        """How many events there are but for the few that mark an end."""
        return sum(ledger.events for ledger in (self.backlog, *self.ledgers))

    def grow(self, size: int) -> float:
        """Write the log up to so many events, with the server away; seconds until it had counted them."""
        self._server.stop()
        log = DataDirectory(self._server.data).open_log()
        records = log.read(USAGE_CONTROL, log.starts(USAGE_CONTROL), bytes_max=1 << 20)
        changes = [change for record in records for change in decode_changes(record.value)]
        (organization,) = [change.organization for change in changes if isinstance(change, OrganizationCreated)]
        written = entries(
            self._bodies, max(0, size - self.events), self.backlog, days=DAYS, organization_id=organization.id
        )
        asyncio.run(fill(log, [], written))
        position = format_position(log.ends(USAGE_EVENTS))
        log.close()
        began_s = time.perf_counter()
        self._server.start()
        self._server.wait_for(position, timeout_s=60 + size / 10_000)
        return time.perf_counter() - began_s

    def restart(self) -> dict[str, float]:
        """Kill everything and start again: milliseconds to the first event taken, and until all is counted."""
        self._server.kill()
        began_s = time.perf_counter()
        self._server.begin()
        position = patiently(lambda: end_position(self._server))
        accepted_ms = 1000 * (time.perf_counter() - began_s)
        patiently(lambda: self._server.wait_for(position, START_TIMEOUT_S))
        return {"restart to taken ms": accepted_ms, "to counted ms": 1000 * (time.perf_counter() - began_s)}

    def month(self, client: httpx.Client) -> tuple[float, int]:
        """A month of the first meter by the day: milliseconds, and its total."""
        began_s = time.perf_counter()
        answer = client.get(f"/v1/meters/{self.ids[0]}/quantities", params=MONTH)
        took_ms = 1000 * (time.perf_counter() - began_s)
        answer.raise_for_status()
        return took_ms, int(answer.json()["total"])

    def ingest(self, run: int, seconds: float, rate: float | None) -> Phase:
        """A stretch of load over HTTP, counted."""
        phase = Phase(self._server, run, seconds, rate)
        self.ledgers.append(phase.ledger)
        return phase


def patiently(ask: Callable[[], Answer]) -> Answer:
    """Ask a server that starts until it answers. Raises what it said last when that takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return ask()
        except (httpx.HTTPError, KeyError):  # KeyError: the answer says that it is not there yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)


@contextmanager
def meanwhile(work: Callable[[], float]) -> Iterator[list[float]]:
    """What repeated work gives while the block runs, twenty times a second at most."""
    found, over = list[float](), threading.Event()

    def repeat() -> None:
        while not over.wait(0.05):
            found.append(work())

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def measured(report: Report, server: Server, history: History, size: int, run: int, seconds: float) -> None:
    """One size: a row, of what was stored at its end, when memory and bytes were taken."""
    before, drained_s = history.events, history.grow(size)
    idle = [history.month(server.http)[0] for _ in range(READS)]
    full = history.ingest(run, seconds, None)
    with (
        httpx.Client(base_url=server.url, headers=server.http.headers, timeout=60) as client,
        meanwhile(lambda: history.month(client)[0]) as busy,
    ):
        history.ingest(run + 1, seconds, full.rate / 2)
    _, total = history.month(server.http)
    aggregator = server.processes()["aggregate"]
    report.check(f"{history.events:,} events: the month's total is the sum of what was sent", total == history.tokens)
    report.add(**{
        "stored": history.events, "drained/s": (size - before) / drained_s, "full speed/s": full.rate,
        "aggregator CPU us/event": 1e6 * full.cpu_s["aggregate"] / full.ledger.events,
        "resident MB": aggregator["resident_mb"], "peak MB": aggregator["peak_mb"],
        "store B/event": (server.data / "store.duckdb").stat().st_size / history.events,
        **_percentiles("month idle", idle), **_percentiles("month at half load", busy), **history.restart(),
    })  # fmt: skip


def _percentiles(name: str, found_ms: list[float]) -> dict[str, float]:
    return {f"{name} p{share} ms": float(np.percentile(found_ms, share)) for share in (50, 99)}


def after(report: Report, server: Server, history: History) -> None:
    """What needs the server to be away: the same chart in SQL, and the store again, which is asked like the old one."""
    server.stop()
    with duckdb.connect(str(server.data / "store.duckdb"), read_only=True) as store:
        took_ms, rows = _timed(lambda: store.execute(SQL).fetchall())
        ((stored,),) = store.execute("SELECT sum(stored) FROM tallies").fetchall()
    report.check("so is that of plain SQL over the rows", sum(row[1] for row in rows) == history.tokens)
    report.add(stored=history.events, **{"month by plain SQL over the rows ms": took_ms})
    took_ms, tallies = _timed(lambda: rebuild(DataDirectory(server.data)))
    report.check(f"the store made again holds the {stored:,} events of before", tallies["stored"] == stored)
    report.add(stored=history.events, **{"rebuild/s": 1000 * history.events / took_ms})
    server.start()
    report.check("and its month has the same total", history.month(server.http)[1] == history.tokens)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began_s = time.perf_counter()
    found = call()
    return 1000 * (time.perf_counter() - began_s), found


def main() -> None:
    """Run and report; exit 3 when a total is not what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--customers", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each stretch of load")
    arguments = parser.parse_args()
    report = Report("history", f"what a long history costs; ten meters, {arguments.customers:,} customers, {DAYS} days")
    with Server() as server:
        history = History(server, arguments.customers)
        for number, size in enumerate(arguments.sizes):
            measured(report, server, history, size, 1 + 2 * number, arguments.seconds)
        after(report, server, history)
    report.finish()
    sys.exit(report.code)


if __name__ == "__main__":
    main()
