"""What the benchmarks' meters are compared with is what their load says."""

import json
from decimal import Decimal

from benchmarks.end_to_end import expected, meters
from benchmarks.load import MODELS, Bodies, Ledger
from benchmarks.shapes import definitions


def test_every_meter_is_expected_to_show_what_the_events_say() -> None:
    """Each of the ten, by a plain recount of the bodies' JSON; two ledgers together are as good as one."""
    first, second, bodies = Ledger(), Ledger(), Bodies(1)
    events = []
    for ledger in (first, second):
        body, numbers = bodies.make()
        numbers.add_to(ledger)
        events += json.loads(body, parse_float=Decimal)["events"]
    facts = [event["metadata"] for event in events]
    latencies = [fact["latency_ms"] for fact in facts]
    both = Ledger().include([first, second])

    assert {body["name"]: expected(body, both) for body in meters()} == {
        "all tokens": sum(fact["tokens"] for fact in facts),
        "requests": len(events),
        "cost": sum(fact["_cost"]["amount"] for fact in facts),
        **{
            f"tokens {model.decode()}": sum(fact["tokens"] for fact in facts if fact["model"] == model.decode())
            for model in MODELS
        },
        "min latency": min(latencies),
        "max latency": max(latencies),
        "avg latency": Decimal(sum(latencies)) / len(latencies),
    }  # fmt: skip


def test_a_meter_that_looks_for_what_no_event_has_is_expected_to_show_nothing() -> None:
    """Of a hundred meters over models four find theirs, of those over names one."""
    ledger = Ledger()
    Bodies(1).make()[1].add_to(ledger)

    for property, found in (("model", 1 + len(MODELS)), ("name", 2)):
        assert sum(expected(body, ledger) > 0 for body in definitions(100, property)) == found
