"""The client library and the server's own senders have the same rules, each in its own distribution.

Neither imports the other, so each rule below is written twice. These tables hold the two together.
"""

from collections.abc import Set
from datetime import UTC, datetime
from typing import NamedTuple

import httpx
import msgspec
import pytest

from aggregator.forward.planner import Bad, Item, Slice, isolate
from deploy.files.sending import refused_events
from ingest.client import Ingestion, Limits, Rejection
from ingest.client.event import Limits as ClientLimits
from ingest.client.outbox import Pace
from ingest.client.transport import Refused, Unavailable, read_answer
from meters.backoff import RETRY_AFTER_S_MAX, Backoff, retry_after_s
from tests.support.servers import faulty_gateway
from tests.support.servers.faulty_gateway import Events, FaultServer, refusal
from tests.support.waiting import PATIENCE_S

NOW = datetime(2026, 3, 1, 12, 0, 0, 250_000, UTC)
NOW_US = int(NOW.timestamp() * 1e6)


@pytest.mark.parametrize("draw", [0.0, 0.25, 0.999])
@pytest.mark.parametrize("failures", [1, 2, 5, 8, 16, 17, 18, 1_000])
def test_pauses_are_the_same(failures: int, draw: float) -> None:
    """After as many failures and with the same random number, whatever the first and the longest pause."""
    for limits in (ClientLimits(), ClientLimits(backoff_s=2.0, backoff_s_max=1e9)):
        pause_s = Backoff(limits.backoff_s, limits.backoff_s_max).pause_s(failures, draw)
        assert Pace(limits, lambda: draw).backoff_s(failures) == pause_s


@pytest.mark.parametrize("header", [
    "", "0", "7", " 7 ", "600", "601", "9" * 5_000, "-5", "1.5", "soon", "\u00b2",
    "Sun, 01 Mar 2026 12:00:30 GMT", "Sun, 01 Mar 2026 12:00:30 +0100", "Sun, 01 Mar 2026 12:00:30 -0000",
    "Sun, 01 Mar 2026 11:00:00 GMT", "Mon, 01 Jan 99999 00:00:00 GMT", "Mon, 01 Jan 99999999999999 00:00:00 GMT",
])  # fmt: skip
def test_a_server_is_given_the_time_it_asks_for(header: str) -> None:
    """``Retry-After`` asks both for the same time, up to the same bound."""
    assert ClientLimits().retry_after_s_max == RETRY_AFTER_S_MAX
    outcome = read_answer(503, {"retry-after": header}, b"", NOW)
    assert isinstance(outcome, Unavailable)
    asked_s = outcome.retry_after_s
    bounded_s = None if asked_s is None else min(asked_s, RETRY_AFTER_S_MAX)
    assert bounded_s == pytest.approx(retry_after_s(header, NOW_US))


def refused_by(*locs: list[str | int]) -> bytes:
    """The body of a refusal with a complaint about each of these."""
    return msgspec.json.encode({"detail": [{"type": "value_error", "loc": loc, "msg": "no"} for loc in locs]})


@pytest.mark.parametrize(("body", "indices"), [
    (refused_by(["body", "events", 3, "name"], ["body", "events", 0, "EventCreateCustomer", "name"]), {0, 3}),
    (refused_by(["body", "events", 3, "name"], ["body", "events", 3, "timestamp"]), {3}),
    (refused_by(["body", "events", 3]), {3}),
    (refused_by(["body", "events", 3, "name"], ["query", "page"]), set()),
    (refused_by(["body", "events"]), set()), (refused_by(["body", "events", "3"]), set()), (refused_by(), set()),
    (b'{"detail":[{"loc":["body","events",1,"name"]}]}', {1}), (b'{"detail":[{"loc":"body","msg":"no"}]}', set()),
    (b'{"detail":"no"}', set()), (b"no", set()), (b"\xff", set()), (b"[" * 100_000, set()),
])  # fmt: skip
def test_a_refusal_names_the_same_events(body: bytes, indices: set[int]) -> None:
    """The client and ``meterstream events`` take the same events for refused; of any other complaint they take none."""
    outcome = read_answer(422, {}, body, NOW)
    assert isinstance(outcome, Refused)
    assert set(outcome.details) == set(refused_events(httpx.Response(422, content=body))) == indices


class Sent(NamedTuple):
    """The ids of the events of every request, and the ids that were refused in the end."""

    requests: list[frozenset[int]]
    refused: set[int]


def by_client(count: int, poison: Set[int], is_named: bool) -> Sent:
    """What the client library sends and refuses of one batch of events."""
    sent, rejected = Sent([], set()), list[Rejection]()

    def script(events: Events, number: int) -> faulty_gateway.Bad | None:
        ids = [int(event["external_id"]) for event in events]
        sent.requests.append(frozenset(ids))
        bad = [(index, "name") for index, id in enumerate(ids) if id in poison]
        return refusal(*bad if is_named else ()) if bad else None

    limits = Limits(linger_s=60, in_flight_max=1)  # all in one batch, and one request at a time
    with FaultServer(script) as server, Ingestion(
        "token", base_url=server.url, spool=None, limits=limits, on_rejected=rejected.append, gzip=False
    ) as ingestion:
        for id in range(count):
            ingestion.ingest({"name": "call", "external_customer_id": "u", "external_id": str(id)})
        assert ingestion.flush(PATIENCE_S)
    sent.refused.update(int(str(rejection.external_id)) for rejection in rejected)
    return sent


def by_forwarder(count: int, poison: Set[int], is_named: bool) -> Sent:
    """What the forwarder sends and refuses of the same batch."""
    sent, items = Sent([], set()), [
        Item(lane="raw", external_id=str(id), who="e:u", timestamp_us=0, ingested_us=0, body=b"{}")
        for id in range(count)
    ]  # fmt: skip
    stack = [Slice("raw", items)]
    while stack:
        whole = stack.pop()
        ids = [int(item.external_id) for item in whole.sent]
        if not ids:
            continue
        sent.requests.append(frozenset(ids))
        accused = {index: "bad" for index, id in enumerate(ids) if id in poison}
        if accused:
            stack += reversed(isolate(whole, Bad("bad", accused if is_named else {}, False)))
    sent.refused.update(int(item.external_id) for item in items if item.condemned)
    return sent


BATCHES = [(1, {0}), (2, {1}), (7, {3}), (40, {0, 39}), (40, {13, 14, 15}), (5, set(range(5))), (20, set())]


@pytest.mark.parametrize(("count", "poison"), BATCHES)
def test_a_refused_batch_is_halved_alike(count: int, poison: set[int]) -> None:
    """Where the refusal names no event, both send the same halves until an event that is refused stands alone."""
    client, forwarder = by_client(count, poison, False), by_forwarder(count, poison, False)
    assert client.refused == forwarder.refused == poison
    assert set(client.requests) == set(forwarder.requests)
    assert len(client.requests) == len(forwarder.requests)


@pytest.mark.parametrize(("count", "poison"), BATCHES)
def test_named_events_are_refused_alike(count: int, poison: set[int]) -> None:
    """Both refuse exactly the named events.

    The requests differ on purpose: the client takes the word of a server that speaks this contract, while the forwarder
    sends a few named events alone first, because it cannot know which version of Polar answers.
    """
    assert by_client(count, poison, True).refused == by_forwarder(count, poison, True).refused == poison
