"""How many events a second go from a POST to a number, how fresh the number is, and whether it is right.

One run: a server of its own, ten meters, 100,000 customers, bodies of 100 events with unique ids. First, after some
seconds in which processes load what they only load when there is much to do, at full speed; then at half of that, or of
100,000 events/s where that is less, with reads of one customer and one meter beside it. The server, the load and the
reader share the machine. At the end every meter's total is compared with the sum of what was acknowledged.

    python -m benchmarks.end_to_end [--seconds 30] [--rate 50000]
"""

import argparse
import json
import multiprocessing
import queue
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import uvloop

from benchmarks.load import LATENCY_MIN_MS, MODELS, Bodies, Ledger, send
from benchmarks.report import Report
from benchmarks.server import TOKEN, Reader, Server

WARM_UP_S = 3.0
WANTED_RATE = 100_000  # events a second; what is faster than that is measured besides, at full speed
EXPECTED_RATE = 150_000  # events a second that full speed may reach; bodies beyond are made while sending
EVENTS_A_BODY = 100
NOON = "2026-03-01T00:00:00Z", "2026-03-01T12:00:00Z"  # until then, and all events of a load lie before
SHOWN = Decimal("1e-12")  # to which the API rounds a mean
NAME = "chat.completion"  # of every event of a load
EVERYTHING: dict[str, Any] = {"conjunction": "and", "clauses": []}


def only(property: str, value: object, operator: str = "eq") -> dict[str, Any]:
    """A filter of one clause."""
    return {"conjunction": "and", "clauses": [{"property": property, "operator": operator, "value": value}]}


def meters() -> list[dict[str, Any]]:
    """Ten meters over three properties, the cost, a name and a region."""
    tokens = {"func": "sum", "property": "tokens"}
    by_model = [
        {"name": f"tokens {model.decode()}", "filter": only("model", model.decode()), "aggregation": tokens}
        for model in MODELS
    ]
    latency = [
        {"name": f"{func} latency", "filter": EVERYTHING, "aggregation": {"func": func, "property": "latency_ms"}}
        for func in ("min", "max", "avg")
    ]
    return [
        {"name": "all tokens", "filter": EVERYTHING, "aggregation": tokens},
        {"name": "requests", "filter": only("name", NAME), "aggregation": {"func": "count"}},
        {"name": "cost", "filter": EVERYTHING, "aggregation": {"func": "sum", "property": "_cost.amount"}},
        *by_model,
        *latency,
    ]


def load(port: int, run: int, seconds: float, rate: float | None, results: Any) -> None:
    """The sender's process. Puts its ledger into the queue ``results``."""
    prepared = int(seconds * (rate or EXPECTED_RATE) / EVENTS_A_BODY)
    bodies = Bodies(run, EVENTS_A_BODY)
    ledger = uvloop.run(send("127.0.0.1", port, TOKEN, bodies, seconds=seconds, rate=rate, prepared=prepared))
    results.put(ledger)


class Phase:
    """One stretch of load, measured from outside."""

    def __init__(self, server: Server, run: int, seconds: float, rate: float | None) -> None:
        self.seconds, self._before = seconds, server.processes()
        _, counts = freshness(server)
        results: multiprocessing.Queue[Ledger] = multiprocessing.Queue()
        sender = multiprocessing.Process(target=load, args=(server.port, run, seconds, rate, results))
        sender.start()
        reads = read_totals(server, lambda: results.empty() and sender.is_alive()) if rate else ([], [])
        self.ledger = taken(results, sender)
        sender.join()
        server.wait_for(end_position(server))
        self.done_s = time.monotonic() - self.ledger.began_s
        after = server.processes()
        self.cpu_s = {name: after[name]["cpu_s"] - self._before[name]["cpu_s"] for name in after}
        self.peak_mb = {name: after[name]["peak_mb"] for name in after}
        edges, later = freshness(server)
        self.freshness = edges, later - counts
        self.reads_ms = [percentiles_ms([read for read in way if read[0] >= self.ledger.began_s]) for way in reads]

    @property
    def rate(self) -> float:
        """Events a second, from the first request until the last event was counted."""
        return self.ledger.events / self.done_s


def warmed(server: Server) -> Ledger:
    """What was acknowledged in some seconds at full speed: a server that starts has to load compiled loops once."""
    return Phase(server, 0, WARM_UP_S, None).ledger


def end_position(server: Server) -> str:
    """The position of an empty request: everything before it is in the log."""
    answer = server.http.post("/v1/events/ingest", json={"events": [{"name": "end", "external_customer_id": "end"}]})
    answer.raise_for_status()
    position: str = answer.headers["log-position"]
    return position


def taken(results: "multiprocessing.Queue[Ledger]", sender: multiprocessing.Process) -> Ledger:
    """The sender's result; it cannot end before it, larger than a pipe, has been taken from the queue."""
    while True:
        try:
            return results.get(timeout=1)
        except queue.Empty:
            if not sender.is_alive():
                raise RuntimeError("the sender failed, see above") from None


Reads = list[tuple[float, float]]  # when each began, and its seconds


def read_totals(server: Server, is_sending: Callable[[], bool]) -> tuple[Reads, Reads]:
    """Reads of one customer's total on one meter while there is load: in turns through the gateway and without it."""
    random = np.random.default_rng(3)
    ids = [meter["id"] for meter in server.http.get("/v1/meters/", params={"limit": 100}).json()["items"]]
    readers = Reader(server.port), Reader(server.aggregator)
    found: tuple[Reads, Reads] = [], []
    while is_sending():
        for reader, reads in zip(readers, found, strict=True):
            customer = f"customer-{random.integers(0, 100_000):08d}"
            began_s = time.monotonic()
            reader.get(f"/v1/meters/{ids[int(random.integers(0, len(ids)))]}/usage?external_customer_id={customer}")
            reads.append((began_s, time.monotonic() - began_s))
            time.sleep(0.005)
    return found


def percentiles_ms(reads: Reads) -> tuple[float | None, float | None]:
    """The median of their times, and what one in a hundred exceeds."""
    if not reads:
        return None, None
    p50, p99 = np.percentile([seconds * 1000 for _, seconds in reads], [50, 99])
    return float(p50), float(p99)


def freshness(server: Server) -> tuple[np.ndarray, np.ndarray]:
    """The freshness histogram so far: upper edges in seconds, and cumulative counts."""
    text = server.http.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("meterstream_freshness_seconds_bucket")]
    edges = [float(line.split('le="')[1].split('"')[0].replace("+Inf", "inf")) for line in lines]
    return np.array(edges), np.array([float(line.rsplit(" ", 1)[1]) for line in lines])


def quantile_ms(edges: np.ndarray, cumulative: np.ndarray, share: float) -> float:
    """A quantile of a cumulative histogram, interpolated inside its bucket, in milliseconds."""
    wanted = share * cumulative[-1]
    place = int(np.searchsorted(cumulative, wanted))
    below, low = (cumulative[place - 1], edges[place - 1]) if place else (0.0, 0.0)
    inside = (wanted - below) / max(cumulative[place] - below, 1.0)
    return 1000 * float(low + inside * (edges[place] - low))


def expected(definition: dict[str, Any], ledger: Ledger) -> Decimal:
    """What a meter has to show of what was acknowledged; its filter names nothing, an event, or a model at most."""
    clauses, aggregation = definition["filter"]["clauses"], definition["aggregation"]
    if clauses and clauses[0]["value"] != NAME:  # tokens of a model, or of something that no event has
        by_model = dict(zip(MODELS, ledger.model_tokens.tolist(), strict=True))
        return Decimal(by_model.get(clauses[0]["value"].encode(), 0))
    if aggregation["func"] == "count":
        return Decimal(ledger.events)
    if aggregation["func"] == "sum":
        tokens, cost = Decimal(ledger.tokens), Decimal(ledger.cost_units).scaleb(-4)
        return cost if aggregation["property"] == "_cost.amount" else tokens
    return latency_ms(aggregation["func"], ledger.latency_counts)


def latency_ms(func: str, counts: np.ndarray) -> Decimal:
    """The least, the greatest or the mean latency, as the API shows it."""
    (present,) = np.nonzero(counts)
    if func == "avg":
        mean = Decimal(int(counts @ np.arange(len(counts)))) / int(counts.sum())
        return LATENCY_MIN_MS + mean.quantize(SHOWN)
    return Decimal(LATENCY_MIN_MS + int(present[0 if func == "min" else -1]))


def check(server: Server, ids: list[str], ledgers: list[Ledger]) -> list[str]:
    """Every meter against what was acknowledged; the differences, in words."""
    everything, differences = Ledger().include(ledgers), []
    for meter_id, definition in zip(ids, meters(), strict=True):
        found, wanted = total(server, meter_id, *NOON), expected(definition, everything)
        if found != wanted:
            differences.append(f"{definition['name']}: {found} instead of {wanted}")
    return differences


def total(server: Server, meter_id: str, start: str, end: str) -> Decimal:
    """What a meter shows for all of a time."""
    parameters = {"start_timestamp": start, "end_timestamp": end, "interval": "month"}
    answer = server.http.get(f"/v1/meters/{meter_id}/quantities", params=parameters, timeout=300)
    answer.raise_for_status()
    found: Decimal = json.loads(answer.text, parse_float=Decimal, parse_int=Decimal)["total"]
    return found


def row(name: str, phase: Phase) -> dict[str, Any]:
    """A phase as a line of the report."""
    events = phase.ledger.events
    edges, counts = phase.freshness
    latencies = np.array(phase.ledger.latencies_s) * 1000
    return {
        "phase": name,
        "seconds": phase.seconds,
        "events": events,
        "events/s": phase.rate,
        "refused": phase.ledger.refused,
        "ack p50 ms": float(np.percentile(latencies, 50)),
        "ack p99 ms": float(np.percentile(latencies, 99)),
        "longest stall ms": 1000 * phase.ledger.stall_s,
        "fresh p50 ms": quantile_ms(edges, counts, 0.5),
        "fresh p99 ms": quantile_ms(edges, counts, 0.99),
        "read p50 ms": phase.reads_ms[0][0],
        "read p99 ms": phase.reads_ms[0][1],
        "without gateway p50 ms": phase.reads_ms[1][0],
        "without gateway p99 ms": phase.reads_ms[1][1],
        "gateway us/ev": 1e6 * phase.cpu_s.get("gateway", 0) / events,
        "aggregate us/ev": 1e6 * phase.cpu_s.get("aggregate", 0) / events,
        "sender us/ev": 1e6 * phase.ledger.cpu_s / events,
        "peak MB": sum(phase.peak_mb.values()),
    }


def main() -> None:
    """Run and report; exit 3 when a total is not what was acknowledged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=None, help="events/s of the second phase")
    arguments = parser.parse_args()
    report = Report("end_to_end", "from a POST to a number, on one machine, all processes included")
    with Server() as server:
        ids = server.create_meters(meters())
        warm = warmed(server)
        full = Phase(server, 1, arguments.seconds, None)
        report.add(**row("full speed", full))
        half = Phase(server, 2, arguments.seconds, arguments.rate or min(full.rate, WANTED_RATE) / 2)
        report.add(**row("half load", half))
        differences = check(server, ids, [warm, full.ledger, half.ledger])
    report.check("; ".join(differences) or "counted = acknowledged, sums exact", not differences)
    report.finish()
    sys.exit(report.code)


if __name__ == "__main__":
    main()
