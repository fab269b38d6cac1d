"""Usage that is too much for a request limit is sent added up, and adds up to the same."""

from decimal import Decimal
from pathlib import Path

import httpx

from aggregator.forward.feed_client import piece_at
from aggregator.forward.forwarder import RolledMeter
from tests.aggregator.forward.test_forwarder import events
from tests.support.polar.forwarder import Clocks, Running
from tests.support.polar.proxy import Polar, send, stored
from tests.support.servers.installation import Installation


def test_usage_can_be_sent_rolled_up(
    tmp_path: Path, ours: Installation, upstream: Installation, polar: Polar, clocks: Clocks, name: str
) -> None:
    """An event per meter, customer and window; a late event goes into another; Polar's meter over them agrees.

    A replay asked for meanwhile sends no event of theirs.
    """
    where = {"conjunction": "and", "clauses": [{"property": "name", "operator": "eq", "value": name}]}
    headers = {"Authorization": f"Bearer {ours.token}"}
    body = {"name": name, "filter": where, "aggregation": {"func": "sum", "property": "n"}}
    meter = httpx.post(f"{ours.url}/v1/meters/", json=body, headers=headers, timeout=60).json()["id"]
    first = events(name, 200, customers=4, timestamp="2026-03-01T10:00:00Z")
    send(ours, [event | {"metadata": {"n": 0.1}} for event in first[:150]])
    feed, rolled = (ours.url, ours.token), (RolledMeter(meter, "sum"),)
    with Running(feed, polar.url, tmp_path / "f.sqlite", clocks=clocks, meters=rolled, is_raw=False) as running:
        running.until(lambda: running.done(4, "rollup"))
        assert running.state.flags()["is_raw"] is False
        running.state.ask_replay("2026-03-01T00:00:00Z", "2026-03-02T00:00:00Z", clocks.now_us())
        send(ours, [event | {"metadata": {"n": 0.1}} for event in first[150:]])  # late for their window
        running.until(lambda: running.done(8, "rollup"))
        assert running.books("rollup") == {"taken": 8, "accepted": 8, "dead": 0}
        assert [replay.lane for replay in running.state.replays()] == ["replay 1"]  # it waits until events are sent
    send(upstream, [{"name": "end", "external_customer_id": "end", "external_id": name}])
    there = [event for event in stored(upstream, "meterstream.rollup") if event["metadata"]["meter"] == meter]
    assert sum(event["metadata"]["events"] for event in there) == 200
    assert sum(Decimal(str(event["metadata"]["value"])) for event in there) == Decimal("20.0")
    assert {event["timestamp"] for event in there} == {"2026-03-01T10:00:00Z"}
    assert len({event["external_id"] for event in there}) == 8
    assert stored(upstream, name) == []  # a sum and its events would count twice


def test_two_pieces_that_begin_in_one_record_have_two_names() -> None:
    """Or the second would be taken for the first, sent again."""
    pieces = [piece_at(position) for position in ({}, {1: (7, 0), 0: (5, 0)}, {1: (7, 0), 0: (5, 3)})]
    assert pieces == ["0", "0:5,1:7", "0:5:3,1:7"]
