"""How long one balance takes to read when there are a million customer meters, idle and while events stream in.

100,000 customers with ten meters each: the customers, a credit for each of them and one event for each are written to
the log first; the server starts over that. Then one reader asks for random balances over HTTP, one after the other,
with and without a sender beside it. Its client only writes and reads bytes, so that the server is what is measured.
Two baselines: the gateway's own ``/livez``, which is not passed on, and a meter, which is and takes the usual way
through the framework. One balance is also asked of the aggregator itself, as behind a proxy (``deploy/proxy``).

    python -m benchmarks.balances [--customers 100000] [--rate 5000] [--seconds 8]
"""

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import numpy as np

from benchmarks.load import Bodies, send
from benchmarks.report import Report
from benchmarks.server import TOKEN, Reader, Server
from deploy.data import DataDirectory
from meters import exact_json
from meters.catalogue import Catalogue, Change, Customer, CustomerCreated, decode_changes, encode_change
from meters.credit import CreditGranted
from meters.ledger import customer_meter_id
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log

METERS = 10
CREDITED = 1_000_000
STREAMED_RUN = 8
AT_ONCE = 5_000  # records appended in one go
RUNS = {"idle": 0.0, "streaming": 1.0}


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
        b'"metadata":{"tokens":7}}' % (number, number)
        for number in range(customers)
    ]
    for first in range(0, customers, 100):
        entry = Entry(b"\n".join(lines[first : first + 100]), 0, organization_id, admitted=True)
        await log.append(USAGE_EVENTS, [entry])


def stream(port: int, customers: int, rate: float, seconds: float) -> None:
    """The sender's process."""
    bodies = Bodies(STREAMED_RUN, customers=customers)
    asyncio.run(send("127.0.0.1", port, TOKEN, bodies, seconds=seconds, rate=rate, connections=4))


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


def check(server: Server, customers: int, meter_ids: list[str]) -> None:
    """Some balances against the running total of the same customer."""
    for number in range(0, customers, max(1, customers // 20)):
        one = exact_json.decode(
            server.http.get(f"/v1/customer-meters/{customer_meter_id(customer_id(number), meter_ids[0])}").content
        )
        usage = server.http.get(f"/v1/meters/{meter_ids[0]}/usage", params={"customer_id": customer_id(number)}).json()
        assert (one["credited_units"], one["consumed_units"]) == (CREDITED, Decimal(usage["value"])), one


def main() -> None:
    """Fill, start, read, and report."""
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
        began = time.perf_counter()
        server.start()
        server.wait_for(position)
        report.add(what="the log read into an empty store", seconds=time.perf_counter() - began)
        server.stop()
        began = time.perf_counter()
        server.start()
        server.wait_for(position)
        report.add(what="started again", seconds=time.perf_counter() - began)
        _read(server, arguments, meter_ids, report)
        check(server, arguments.customers, meter_ids)
        report.add(what="memory of the aggregator", peak_mb=server.processes()["aggregate"]["peak_mb"])
    report.finish()


def _read(server: Server, arguments: argparse.Namespace, meter_ids: list[str], report: Report) -> None:
    asked = questions(server, arguments.customers, meter_ids)
    for name, share in RUNS.items():
        rate = share * arguments.rate
        seconds = arguments.seconds * len(asked) + 2
        work = server.port, arguments.customers, rate, seconds
        sender = multiprocessing.Process(target=stream, args=work) if rate else None
        if sender is not None:
            sender.start()
            time.sleep(1)  # until it sends
        for what, (address, path) in asked.items():
            report.add(what=what, beside=name, events_a_second=rate, **measure(address, path, arguments.seconds))
        if sender is not None:
            sender.join()


if __name__ == "__main__":
    main()
