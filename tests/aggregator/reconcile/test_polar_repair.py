"""What a repair sends to Polar: requests that it takes, again until it does."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from aggregator.forward.polar_client import Clock, NoAnswer, RequestWindow, Upstream
from deploy.client import Api
from deploy.errors import GiveUp
from deploy.reconcile.run import REPAIRS, requests, send
from deploy.server.control import new_secret, new_token, open_control
from meters.catalogue.catalogue import TokenCreated
from tests.support.polar.forwarder import Clocks
from tests.support.polar.proxy import Polar
from tests.support.polar.two_servers import TwoSides, numbered
from tests.support.servers.installation import Installation
from tests.support.waiting import eventually

EVENT = b'{"name":"repaired","external_id":"%d","external_customer_id":"ann","timestamp":"2026-01-01T00:00:00Z"}'


@pytest.fixture
def polar(servers: tuple[Installation, Installation]) -> Iterator[Polar]:
    """The other server, behind a proxy that fails on request."""
    proxy = Polar(servers[1], Clocks().now_us)
    yield proxy
    proxy.close()


def test_requests_are_cut_by_events_and_by_bytes() -> None:
    """Every event is in one of them, in order, and none is larger than allowed."""
    bodies = [b"%03d" % number for number in range(100)]

    few, small = list(requests(bodies, events_max=40)), list(requests(bodies, bytes_max=100))

    assert [len(body.split(b",")) for body in few] == [40, 40, 20]
    assert [max(map(len, small)), len(small)] == [96, 5]
    assert b",".join(body[len(b'{"events":['):-len(b"]}")] for body in small) == b",".join(bodies)
    assert list(requests([])) == []


def test_a_repair_waits_as_long_as_it_is_asked_to(polar: Polar, tmp_path: Path) -> None:
    """What passes is tried again, after the pause that Polar wishes or one of its own, until it is through."""
    faults, pauses = ["429", "503 before", "500 after commit", "cut"], []
    polar.fault = lambda: faults.pop(0) if faults else None
    clock = Clock(Clocks().now_us, pauses.append, Clocks().now_us)
    window = RequestWindow(tmp_path / "requests", clock=clock)

    with Upstream(polar.url, "polar_oat_upstream", window) as upstream:
        answer = send(upstream, next(requests([EVENT % 1])))
    window.close()

    assert answer == (0, 1)  # it was carried out before it was answered with 500
    assert len(pauses) == 4
    assert pauses[0] >= 1.0  # as the header says; without one a first pause is half a second at most
    assert len(polar.arrivals_us) == 5


def test_short_wishes_do_not_use_up_the_attempts(polar: Polar, tmp_path: Path) -> None:
    """Polar answers 429 and wishes a second each time: the pauses grow all the same, to minutes together."""
    pauses: list[float] = []
    polar.fault = lambda: "429"
    window = RequestWindow(tmp_path / "requests", clock=Clock(Clocks().now_us, pauses.append, Clocks().now_us))

    with Upstream(polar.url, "polar_oat_upstream", window) as upstream, pytest.raises(NoAnswer, match="429"):
        send(upstream, next(requests([EVENT % 4])))
    window.close()

    assert sum(pauses) > 60


def test_a_repair_whose_answer_cannot_be_read_is_not_taken_for_made(polar: Polar, tmp_path: Path) -> None:
    """A success with half an answer: whoever repairs is told, and the events are there for the next look to find."""
    polar.fault = lambda: "garbled"
    window = RequestWindow(tmp_path / "requests")

    with Upstream(polar.url, "polar_oat_upstream", window) as upstream, pytest.raises(NoAnswer, match="cannot be read"):
        send(upstream, next(requests([EVENT % 3])))
    window.close()

    assert polar.committed == ["3"]


def test_a_repair_that_is_refused_ends_at_once(polar: Polar, tmp_path: Path) -> None:
    """What no repetition changes is told in Polar's words."""
    polar.is_denied = True
    window = RequestWindow(tmp_path / "requests")

    with Upstream(polar.url, "polar_oat_upstream", window) as upstream, pytest.raises(GiveUp, match="revoked"):
        send(upstream, next(requests([EVENT % 2])))
    window.close()

    assert len(polar.arrivals_us) == 1


def test_what_was_sent_before_polar_refused_is_told(sides: TwoSides, polar: Polar) -> None:
    """A token that is revoked half way ends it: how much is there by then is said, and why the rest is not."""
    sides.here.send(*numbered(3))
    sides.chosen = {"polar_batch_events": 1}
    missing = sides.check().differences
    sides.there.url = polar.url
    polar.fault = lambda: setattr(polar, "is_denied", len(polar.arrivals_us) > 2)

    done = sides.repair(missing)

    assert done is not None
    assert (done.count, len(polar.committed)) == (2, 2)
    assert "Sent to Polar again: 2 events were new there" in done.what
    assert "Not done: the rest" in done.what
    assert "revoked" in done.what


def test_a_repair_that_was_not_made_is_written_down(sides: TwoSides) -> None:
    """With a token that may only read: the differences are in the report all the same, and the record says why."""
    sides.here.send(*numbered(3))
    with open_control(sides.there.data) as control:
        few, owner = new_secret(), control.organization(sides.there.id)
        scopes = ["events:read", "meters:read", "customer_meters:read"]
        control.decide([TokenCreated(new_token(owner, "few", few, scopes))])
    with Api(sides.there.url, few) as api:
        eventually(lambda: api.send("POST", "/v1/events/ingest").status_code == 403)
        eventually(lambda: api.send("GET", "/v1/meters/").status_code == 200)
    sides.there.token = few

    report = sides.prove("apply")

    written = (sides.here.data.path / "reconcile" / REPAIRS).read_text().splitlines()[-1]
    assert sum(one.count for one in report.differences) == 3
    assert any("Not done: the rest" in step.what for step in report.done)
    assert msgspec.json.decode(written)["done"] == msgspec.to_builtins(report.done)
