"""How long one balance takes to read when there are a million customer meters, idle and while events stream in: a few,
and what ``end_to_end`` takes for half of the load.

100,000 customers with ten meters each: the customers, a credit for each of them and one event for each are written to
the log first; the server starts over that. Then one reader asks for random balances over HTTP, one after the other,
with and without a sender beside it. Its client only writes and reads bytes, so that the server is what is measured.
Two baselines: the gateway's own ``/livez``, which is not passed on, and a meter, which is and takes the usual way
through the framework. One balance is also asked of the aggregator itself, as behind a proxy (``deploy/proxy``). At the
end balances agree with totals, and a total over everything with the sum of what was written and acknowledged.

    python -m benchmarks.balances [--customers 100000] [--rate 5000] [--seconds 8]
"""

import argparse
import asyncio
import multiprocessing
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import numpy as np

from benchmarks.end_to_end import WARM_UP_S, end_position, taken, total
from benchmarks.goals import of
from benchmarks.load import Bodies, Ledger, send
from benchmarks.page import results
from benchmarks.report import Report
from benchmarks.server import TOKEN, Reader, Server
from deploy.server.data import DataDirectory
from meters import exact
from meters.catalogue.catalogue import Catalogue, Change, Customer, CustomerCreated, decode_changes, encode_change
from meters.ledger.ledger import CreditGranted, customer_meter_id
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log

METERS = 10
CREDITED = 1_000_000
WARM_UP_RUN, STREAMED_RUN = 7, 8
AT_ONCE = 5_000  # records appended in one go
HALF_LOAD = 40_000  # events a second, where full speed was not measured
FIRST_TOKENS = 7  # of each customer's first event


def definitions() -> list[dict[str, Any]]:
    """Meters that all count every event: the dearest way to have ten."""
    everything = {"conjunction": "and", "clauses": []}
    tokens = {"func": "sum", "property": "tokens"}
    return [{"name": f"tokens {number}", "filter": everything, "aggregation": tokens} for number in range(METERS)]


def customer_id(number: int) -> str:
    """The same customer in every run."""
    return str(UUID(int=number + 1, version=4))


async def fill(log: Log, customers: int, meter_id: str) -> None:
    """Customers, a credit of one meter for each, and one event for each."""
    records = log.read(USAGE_CONTROL, log.starts(USAGE_CONTROL), bytes_max=1 << 24)
    catalogue = Catalogue(change for record in records for change in decode_changes(record.value))
    (organization_id,) = catalogue.organizations
    now = datetime.now(UTC)
    changes: list[Change] = []
    for number in range(customers):
        id = customer_id(number)
        name = f"customer-{number:08d}"
        changes.append(CustomerCreated(Customer(
            id=id, organization_id=organization_id, created_at=now, external_id=name, email=f"{name}@example.com"
        )))  # fmt: skip
        changes.append(CreditGranted(
            id=f"credit-{number}", organization_id=organization_id, customer_id=id, meter_id=meter_id,
            units=Decimal(CREDITED), at=now,
        ))  # fmt: skip
        if len(changes) >= AT_ONCE or number == customers - 1:
            await log.append(USAGE_CONTROL, [Entry(encode_change(change), admitted=True) for change in changes])
            changes = []
    lines = [
        b'{"name":"chat.completion","external_customer_id":"customer-%08d","external_id":"first-%d",'
        b'"metadata":{"tokens":%d}}' % (number, number, FIRST_TOKENS)
        for number in range(customers)
    ]
    for first in range(0, customers, 100):
        entry = Entry(b"\n".join(lines[first : first + 100]), 0, organization_id, admitted=True)
        await log.append(USAGE_EVENTS, [entry])


def half_load() -> float:
    """What ``end_to_end`` took for half of the load."""
    found = results().get("end_to_end")
    return of("events/s", phase="half load")(found["rows"]) if found else HALF_LOAD


def stream(port: int, bodies: Bodies, rate: float, seconds: float, results: Any) -> None:
    """The sender's process. Puts its ledger into the queue ``results``."""
    results.put(asyncio.run(send("127.0.0.1", port, TOKEN, bodies, seconds=seconds, rate=rate)))


def measure(address: int | Path, path: Callable[[], str], seconds: float) -> dict[str, float]:
    """Latencies of reads, one after the other, as their client sees them."""
    ask = Reader(address).get
    found, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        ask(path())
        found.append(time.perf_counter() - began)
    p50, p99 = np.percentile(found, (50, 99)) * 1000
    return {"reads": len(found), "p50_ms": float(p50), "p99_ms": float(p99)}


Question = tuple[int | Path, Callable[[], str]]  # where to ask, and a path, another one each time


def questions(server: Server, customers: int, meter_ids: list[str]) -> dict[str, Question]:
    """What is asked, again and again."""
    random = Random(1)
    gateway = server.port

    def balance() -> str:
        return f"/v1/customer-meters/{customer_meter_id(customer_id(random.randrange(customers)), meter_ids[0])}"

    def total() -> str:
        return f"/v1/meters/{meter_ids[0]}/usage?external_customer_id=customer-{random.randrange(customers):08d}"

    def every_meter() -> str:
        return f"/v1/customer-meters/?customer_id={customer_id(random.randrange(customers))}"

    return {
        "the gateway alone (baseline)": (gateway, lambda: "/livez"),
        "a meter (baseline)": (gateway, lambda: f"/v1/meters/{meter_ids[0]}"),
        "one balance": (gateway, balance),
        "one balance, no gateway between": (server.aggregator, balance),
        "one total": (gateway, total),
        "a customer's ten balances": (gateway, every_meter),
    }


def check(server: Server, customers: int, meter_ids: list[str], tokens: int) -> list[str]:
    """Some balances against the running total of the same customer, and everybody's; the differences, in words."""
    server.wait_for(end_position(server))
    found = total(server, meter_ids[0], "2026-03-01T00:00:00Z", (datetime.now(UTC) + timedelta(days=1)).isoformat())
    wrong = [] if found == tokens else [f"all tokens: {found} instead of {tokens}"]
    for number in range(0, customers, max(1, customers // 20)):
        one = exact.decode(
            server.http.get(f"/v1/customer-meters/{customer_meter_id(customer_id(number), meter_ids[0])}").content
        )
        usage = server.http.get(f"/v1/meters/{meter_ids[0]}/usage", params={"customer_id": customer_id(number)}).json()
        if (one["credited_units"], one["consumed_units"]) != (CREDITED, Decimal(usage["value"])):
            wrong.append(f"customer {number}: {one['consumed_units']} instead of {usage['value']}")
    return wrong


def main() -> None:
    """Fill, start, read, and report; exit 3 when a total is not what was written and acknowledged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--customers", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=5_000)
    parser.add_argument("--seconds", type=float, default=8)
    arguments = parser.parse_args()
    report = Report("balances", f"reading one of {arguments.customers * METERS:,} customer meters")
    with Server() as server:
        meter_ids = server.create_meters(definitions())
        server.stop()
        log = DataDirectory(server.data).open_log()
        asyncio.run(fill(log, arguments.customers, meter_ids[0]))
        position = ",".join(f"{partition}:{end}" for partition, end in log.ends(USAGE_EVENTS).items())
        log.close()
        for what in ("the log read into an empty store", "started again"):
            began = time.perf_counter()
            server.start()
            server.wait_for(position)
            report.add(what=what, seconds=time.perf_counter() - began)
            server.stop()
        server.start()
        tokens = FIRST_TOKENS * arguments.customers + _read(server, arguments, meter_ids, report)
        differences = check(server, arguments.customers, meter_ids, tokens)
        report.add(what="memory of the aggregator", peak_mb=server.processes()["aggregate"]["peak_mb"])
    report.check("; ".join(differences) or "counted = acknowledged, balances agree", not differences)
    report.finish()
    sys.exit(report.code)


def _read(server: Server, arguments: argparse.Namespace, meter_ids: list[str], report: Report) -> int:
    """Rows of every question beside each load; the tokens of what was acknowledged meanwhile."""
    asked = questions(server, arguments.customers, meter_ids)
    seconds = arguments.seconds * len(asked) + 2
    bodies = Bodies(WARM_UP_RUN, customers=arguments.customers)  # compiled loops are loaded before anything is asked
    tokens = asyncio.run(send("127.0.0.1", server.port, TOKEN, bodies, seconds=WARM_UP_S, rate=None)).tokens
    loads = {"idle": 0.0, "streaming": arguments.rate, "half load": half_load()}
    for run, (name, rate) in enumerate(loads.items(), STREAMED_RUN):
        ledgers: multiprocessing.Queue[Ledger] = multiprocessing.Queue()
        work = server.port, Bodies(run, customers=arguments.customers), rate, seconds, ledgers
        sender = multiprocessing.Process(target=stream, args=work) if rate else None
        if sender is not None:
            sender.start()
            time.sleep(1)  # until it sends
        found = {what: measure(address, path, arguments.seconds) for what, (address, path) in asked.items()}
        ledger = taken(ledgers, sender) if sender is not None else Ledger()
        for what, row in found.items():
            report.add(what=what, beside=name, events_a_second=ledger.events / seconds, **row)
        tokens += ledger.tokens
    return tokens


if __name__ == "__main__":
    main()
