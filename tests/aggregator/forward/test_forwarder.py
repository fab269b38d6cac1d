"""Whatever Polar answers: nothing is lost, nothing doubled there, and never more requests than allowed."""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from aggregator.forward.feed_client import Away, Page, Selection, Source
from aggregator.forward.forwarder import EASE_US, SKEW_FIRST_US
from aggregator.forward.planner import Reached
from meters.log import FeedPlace
from tests.support.polar.forwarder import Clocks, Running
from tests.support.polar.proxy import BREAKING, FAULTS, POISON, Polar, send, stored
from tests.support.servers.installation import Installation

SEED = 20261121
TIMEOUT_S = 0.5  # for a whole minute; the proxy is slower by half when it is slow


def events(name: str, number: int, customers: int = 10, **more: Any) -> list[dict[str, Any]]:
    """Events with an amount each, customer by customer in turn."""
    return [
        {"name": name, "external_customer_id": f"{name}-c{n % customers}", "external_id": f"{name}-{n}",
         "metadata": {"n": n}, **more}
        for n in range(number)
    ]  # fmt: skip


def ids(found: Iterable[dict[str, Any]]) -> list[str]:
    """Their external ids."""
    return [event["external_id"] for event in found]


def by_customer(found: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """The ids of each customer's events, in order."""
    order: dict[str, list[str]] = {}
    for event in found:
        order.setdefault(event["external_customer_id"], []).append(event["external_id"])
    return order


class Room:
    """Both servers, the proxy, and a forwarder of one event name."""

    def __init__(self, ours: Installation, upstream: Installation, polar: Polar, state: Path, name: str) -> None:
        self.ours, self.upstream, self.polar, self.name = ours, upstream, polar, name
        self.feed = ours.url, ours.token
        self._state = state

    def forwarder(self, clocks: Clocks, **wishes: Any) -> Running:
        """A forwarder of this test's events."""
        selection = Selection(names=(self.name,))
        return Running(self.feed, self.polar.url, self._state, clocks=clocks, **{"selection": selection} | wishes)

    def send(self, sent: list[dict[str, Any]]) -> None:
        """Have events counted here."""
        send(self.ours, sent)

    def here(self) -> list[dict[str, Any]]:
        """What was counted here."""
        return stored(self.ours, self.name)

    def there(self) -> list[dict[str, Any]]:
        """What was counted upstream, once it has counted everything that it took."""
        send(self.upstream, [{"name": "end", "external_customer_id": "end", "external_id": self.name}])
        return stored(self.upstream, self.name)


@pytest.fixture
def room(ours: Installation, upstream: Installation, polar: Polar, state: Path, name: str) -> Room:
    """See the class."""
    return Room(ours, upstream, polar, state, name)


def test_what_was_counted_arrives(room: Room, clocks: Clocks) -> None:
    """All of it, once, in order, as it was, in as few requests as the batch allows."""
    room.send(events(room.name, 1_000))
    with room.forwarder(clocks, batch_events=300) as running:
        running.until(lambda: running.done(1_000))
        assert running.books()["accepted"] == 1_000
    assert len(room.polar.arrivals_us) == 4
    assert room.there() == room.here()


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_survived(
    room: Room, clocks: Clocks, fault: str, record_property: Callable[[str, object], None]
) -> None:
    """Every other request goes wrong: all arrives, once, each customer's in order; what was repeated is a duplicate."""
    room.send(events(room.name, 80))
    wrong = cycle([fault, None])
    room.polar.fault = lambda: next(wrong)
    timeout_s = TIMEOUT_S if fault == "slow" else 30.0  # what is merely late must not look like a fault
    with room.forwarder(clocks, batch_events=40, timeout_s=timeout_s, requests_max=15) as running:
        running.until(lambda: running.done(80))
        assert running.books() == {"taken": 80, "accepted": 80, "dead": 0}
        sums = running.state.tallies()[""]
    assert room.there() == room.here()
    assert room.polar.busiest() <= 15
    assert sums["inserted"] + sums["duplicates"] == 80
    is_committed = fault not in ("429", "503 before")
    assert (len(room.polar.committed) > 80) is is_committed
    assert (sums["duplicates"] > 0) is is_committed
    record_property(
        "figures",
        f"forwarding, {fault}: {len(room.polar.arrivals_us)} requests, at most {room.polar.busiest()} of 15 in 60 s, "
        f"{len(room.polar.committed) - 80} of 80 events sent again; lost 0, doubled 0"
    )


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_a_bad_day(
    room: Room, clocks: Clocks, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """All faults, poison among the events, and a small limit: the books agree with the upstream, to the event."""
    good = events(room.name, 1_000, customers=40)
    poison = [event | {"external_id": f"{POISON}-{event['external_id']}"} for event in good[100:1_000:250]]
    room.send(sorted([*good, *poison], key=lambda event: event["metadata"]["n"]))
    room.polar.names_the_accused = seed % 2 == 0
    room.polar.seeded(seed, rate=0.3)
    with room.forwarder(clocks, batch_events=60, timeout_s=TIMEOUT_S, requests_max=20) as running:
        running.until(lambda: running.done(1_004))
        assert running.books() == {"taken": 1_004, "accepted": 1_000, "dead": 4}
        dead = running.state.dead()
        sums = running.state.tallies()[""]
    expected = [event for event in room.here() if not event["external_id"].startswith(POISON)]
    there = room.there()
    assert sorted(ids(there)) == sorted(ids(expected))
    assert by_customer(there) == by_customer(expected)
    assert {letter.external_id for letter in dead} == set(ids(poison))
    assert all("Customer not found." in letter.words for letter in dead)
    assert room.polar.busiest() <= 20
    record_property(
        "figures",
        f"forwarding, seed {seed}: {len(room.polar.arrivals_us)} requests, at most {room.polar.busiest()} of 20 in "
        f"60 s, faults {room.polar.faults}, {len(room.polar.committed) - len(set(room.polar.committed))} events "
        f"repeated, 4 of 4 poisoned apart, {sums['refused']} refusals; lost 0, doubled 0",
    )


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("poisoned", [1, 12])
def test_poison_does_not_hold_up_the_rest(room: Room, clocks: Clocks, is_named: bool, poisoned: int) -> None:
    """What Polar refuses becomes a dead letter with its words, found by its index or by halving; the rest passes."""
    room.polar.names_the_accused = is_named
    bad = events(room.name, poisoned)
    poison = [event | {"external_id": f"{POISON}-{room.name}-{n}"} for n, event in enumerate(bad)]
    room.send([*events(room.name, 30), *poison, *events(room.name, 60)[30:]])
    with room.forwarder(clocks) as running:
        running.until(lambda: running.done(60 + poisoned))
        assert running.books() == {"taken": 60 + poisoned, "accepted": 60, "dead": poisoned}
        letters = running.state.dead()
        assert {letter.external_id for letter in letters} == set(ids(poison))
        assert all("Customer not found." in letter.words for letter in letters)
    assert len(room.there()) == 60
    if is_named:
        assert len(room.polar.arrivals_us) <= 4


@pytest.mark.parametrize(("customers", "place"), [(10, 0), (1, 20)])
def test_an_event_that_breaks_polar_does_not_hold_up_the_rest(room: Room, customers: int, place: int) -> None:
    """500 for whatever it is in: it ends as a dead letter with Polar's words, even where all are of its customer."""
    sent = events(room.name, 40, customers)
    sent[place]["external_id"] = f"{BREAKING}-{room.name}"
    room.send(sent)
    clocks = Clocks(600.0)
    with room.forwarder(clocks) as running:
        running.until(lambda: running.done(40))
        assert running.books() == {"taken": 40, "accepted": 39, "dead": 1}
        (letter,) = running.state.dead()
        assert (letter.external_id, letter.words) == (sent[place]["external_id"], "status 500: Internal Server Error")
        assert by_customer(room.there()) == by_customer(sent[:place] + sent[place + 1 :])
        room.polar.is_mended = True
        running.state.ask_replay("2000-01-01T00:00:00Z", "2100-01-01T00:00:00Z", clocks.now_us())
        running.until(lambda: not running.state.replays())
        assert running.books() == {"taken": 40, "accepted": 40, "dead": 0}


def test_a_refusal_by_name_shows_that_polar_is_there(room: Room) -> None:
    """What it took last speaks for it, even if it would not take that again: the event that breaks it is found."""
    sent = events(room.name, 20, customers=1)
    sent[10]["external_id"] = f"{BREAKING}-{room.name}"
    room.send(sent)
    room.polar.refuses_repetitions = True
    with room.forwarder(Clocks(600.0)) as running:
        running.until(lambda: running.done(20))
        assert running.books() == {"taken": 20, "accepted": 19, "dead": 1}


def test_an_event_that_breaks_polar_is_found_across_restarts(room: Room) -> None:
    """Though everything that is left is its customer's and waits behind it."""
    sent = events(room.name, 20, customers=1)
    sent[10]["external_id"] = f"{BREAKING}-{room.name}"
    room.send(sent)
    clocks = Clocks(600.0)
    for reached in (lambda running: running.state.waiting()[0] == 10, lambda running: running.done(20)):
        with room.forwarder(clocks) as running:
            running.until(lambda running=running, reached=reached: reached(running))  # type: ignore[misc]
    with room.forwarder(clocks) as running:
        assert running.books() == {"taken": 20, "accepted": 19, "dead": 1}
    assert ids(room.there()) == ids(sent[:10] + sent[11:])


def test_an_outage_condemns_nothing(room: Room) -> None:
    """However long Polar answers everything with 5xx and whatever it is asked: then all arrives, in order."""
    room.send(events(room.name, 60, customers=3))
    failures = iter(["503 before"] * 30)
    room.polar.fault = lambda: next(failures, None)
    with room.forwarder(Clocks(1_200.0), batch_events=20) as running:
        running.until(lambda: running.done(60))
        assert running.books() == {"taken": 60, "accepted": 60, "dead": 0}
    there = room.there()
    assert room.polar.faults == {"503 before": 30}
    assert sorted(ids(there)) == sorted(ids(room.here()))
    assert by_customer(there) == by_customer(room.here())


def test_a_refused_token_stops_until_it_is_mended(room: Room, clocks: Clocks) -> None:
    """Nothing is tried again by itself; the reason says what to do; after ``resume`` it goes on where it was."""
    room.send(events(room.name, 50))
    room.polar.is_denied = True
    with room.forwarder(clocks) as running:
        running.until(lambda: running.state.flags().get("stopped"))
        assert "401 (The access token is revoked.): give a token" in running.state.flags()["stopped"]
        for _ in range(5):
            running.clocks.pause(running.forwarder.turn())
        assert len(room.polar.arrivals_us) == 1
        room.polar.is_denied = False
        running.state.set(resumed_us=clocks.now_us())
        running.until(lambda: running.done(50))
        assert "stopped" not in running.state.flags()
    assert room.there() == room.here()


def test_a_forwarder_that_follows_a_stopped_one_has_not_stopped(room: Room, clocks: Clocks) -> None:
    """What one found is said no longer once another asks Polar anew, in the same process, too."""
    room.send(events(room.name, 5))
    room.polar.is_denied = True
    with room.forwarder(clocks) as running:
        running.until(lambda: running.state.flags().get("stopped"))
    room.polar.is_denied = False
    with room.forwarder(clocks) as running:
        running.until(lambda: running.done(5))
        assert "stopped" not in running.state.flags()


def test_the_limit_holds_across_restarts(room: Room, clocks: Clocks) -> None:
    """A new process counts the requests of the one before it, those that were under way, too."""
    room.send(events(room.name, 120))
    for part in range(1, 5):
        with room.forwarder(clocks, batch_events=5, requests_max=8) as running:
            running.until(lambda part=part: running.done(30 * part))  # type: ignore[misc]
            running.window.take()  # as if it were killed while it asked
    assert len(room.polar.arrivals_us) == 24
    assert room.polar.busiest() <= 8
    assert room.there() == room.here()


def test_a_trickle_leaves_room_for_others(room: Room, clocks: Clocks) -> None:
    """A backlog goes at full speed; when there is no more, events gather so long that half of the limit stays free."""
    room.send(events(room.name, 12))
    with room.forwarder(clocks, requests_max=20, batch_events=5) as running:
        pauses = [running.forwarder.turn() for _ in range(3)]
        assert running.done(12)
    assert pauses == [0.0, 0.0, 2 * 60 / 20]


def test_an_event_of_the_future_waits_until_it_is_past(room: Room) -> None:
    """It, and what follows of its customer, waits; others pass at once. An upstream whose clock is behind is heard."""
    clocks, hour_s = Clocks(), 3600.0
    future, *rest = events(room.name, 6, customers=3, timestamp="2026-03-01T10:00:00Z")
    room.send([future | {"timestamp": datetime.now(UTC).isoformat()}, *rest])
    room.polar.is_strict, room.polar.behind_s, clocks.behind_s = True, hour_s, hour_s
    with room.forwarder(clocks) as running:
        running.until(lambda: running.taken() == 6)
        assert running.state.waiting()[0] == 2
        clocks.behind_s = 0.0
        running.until(lambda: running.state.tallies().get("", {}).get("refused", 0) >= 2)  # not its own fault, then
        room.polar.behind_s = 0.0
        running.until(lambda: running.done(6))
        assert running.books() == {"taken": 6, "accepted": 6, "dead": 0}
    there = room.there()
    assert by_customer(there) == by_customer(room.here())
    assert sorted(ids(there)) == sorted(ids(room.here()))


def test_a_clock_that_was_mended_holds_nothing_up(room: Room) -> None:
    """While Polar's clock is behind that is in sight, and what comes some minutes after it was mended waits no more."""
    first, second = events(room.name, 2)
    room.send([first])
    room.polar.behind_s = 3600.0
    room.polar.fault = lambda: setattr(room.polar, "is_strict", len(room.polar.arrivals_us) == 1)  # the first request
    clocks = Clocks()
    with room.forwarder(clocks) as running:
        running.until(lambda: running.done(1) and running.state.flags()["skew_us"] == SKEW_FIRST_US)
        clocks.leap(EASE_US / 1e6)
        running.until(lambda: running.state.flags()["skew_us"] == 0)
        clocks.leap(-EASE_US / 1e6)
        room.send([second])
        running.until(lambda: running.taken() == 2)
        assert running.state.waiting()[0] == 0
    assert ids(room.there()) == ids([first, second])


def test_a_pause_is_kept_and_ended(room: Room, clocks: Clocks) -> None:
    """Nothing is sent while it lasts; afterwards everything is."""
    room.send(events(room.name, 10))
    with room.forwarder(clocks) as running:
        running.state.set(paused=True)
        for _ in range(5):
            running.clocks.pause(running.forwarder.turn())
        assert room.polar.arrivals_us == []
        assert running.state.flags()["pending"] == 10
        running.state.set(paused=None)
        running.until(lambda: running.done(10))
    assert len(room.there()) == 10


def test_a_range_of_time_is_sent_again(room: Room, clocks: Clocks) -> None:
    """A replay sends what lies in its range, dead letters too: what Polar has is a duplicate, what it lacks arrives."""
    sent = events(room.name, 30)
    for n, event in enumerate(sent):
        event["timestamp"] = f"2026-03-0{1 + n % 3}T00:00:00Z"
    sent[4]["external_id"] = f"{POISON}-{room.name}"
    room.send(sent)
    with room.forwarder(clocks) as running:
        running.until(lambda: running.done(30))
        assert running.books() == {"taken": 30, "accepted": 29, "dead": 1}
        room.polar.knows_everybody = True
        running.state.ask_replay("2026-03-02T00:00:00Z", "2026-03-03T00:00:00Z", clocks.now_us())
        running.until(lambda: not running.state.replays())
        assert running.books("replay 1") == {"taken": 10, "accepted": 10, "dead": 0}
        assert running.books() == {"taken": 30, "accepted": 30, "dead": 0}
        assert running.state.tallies()[""]["duplicates"] == 9
    assert sorted(ids(room.there())) == sorted(ids(sent))


def read_up_to(source: Source, ahead: dict[int, FeedPlace]) -> Callable[[Reached, Selection, int], Page]:
    """Pages of a feed whose store reads up to these places still, as the server says so: until then it has none."""

    def page(reached: Reached, selection: Selection, limit: int) -> Page:
        if reached.position == ahead:
            ends = source.end().position
            if any(ends[partition] < place for partition, place in ahead.items()):
                raise Away("the store has yet to read up to the position")
            reached = Reached(ahead, None)
        return whole(reached, selection, limit)

    whole = source.page
    return page


def test_a_replay_does_not_end_while_the_store_catches_up(
    room: Room, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is made again does not have yet all that was sent: the replay waits for the rest of its range."""
    sent = events(room.name, 20, timestamp="2026-03-02T12:00:00Z")
    room.send(sent[:10])
    with room.forwarder(clocks) as running:
        end = running.source.end()
        ahead = {partition: (offset + 1, 0) for partition, (offset, _) in end.position.items()}
        stood = Reached(ahead, end.witnesses)  # sent before the store was deleted
        running.state.mark("raw", [], stood, clocks.now_us())
        monkeypatch.setattr(running.source, "page", read_up_to(running.source, ahead))
        running.state.ask_replay("2026-03-02T00:00:00Z", "2026-03-03T00:00:00Z", clocks.now_us())
        running.until(lambda: running.taken("replay 1") == 10)
        for _ in range(10):
            running.clocks.pause(running.forwarder.turn())
        assert [replay.number for replay in running.state.replays()] == [1]
        room.send(sent[10:])
        running.until(lambda: not running.state.replays())
        assert running.books("replay 1") == {"taken": 20, "accepted": 20, "dead": 0}
    assert ids(room.there()) == ids(sent)


def test_only_what_is_selected_is_sent(room: Room, clocks: Clocks) -> None:
    """By name and by a filter over metadata; the rest is passed over and never read again."""
    room.send(events(room.name, 40))
    few = '{"conjunction":"and","clauses":[{"property":"n","operator":"lt","value":7}]}'
    with room.forwarder(clocks, selection=Selection(names=(room.name,), filter=few)) as running:
        running.until(lambda: running.done(7))
        running.until(lambda: running.source.backlog(running.state.position("raw"), Selection())[0] == 0)
        assert running.books()["accepted"] == 7
    assert [event["metadata"]["n"] for event in room.there()] == list(range(7))


def test_forwarding_begins_with_the_log_by_itself(room: Room, clocks: Clocks) -> None:
    """That it does is written down as well, so that nobody has to guess it later."""
    room.send(events(room.name, 3))
    with room.forwarder(clocks) as running:
        running.until(lambda: running.done(3))
        began = running.state.begin_of("raw")
    assert began is not None
    assert began.position == {}


def test_forwarding_can_begin_with_what_comes_from_now_on(room: Room, clocks: Clocks) -> None:
    """What was counted before the first start stays here; what comes between two starts does not."""
    first, second = events(room.name, 20)[:10], events(room.name, 20)[10:]
    room.send(first)
    with room.forwarder(clocks, begin="now") as running:
        running.until(lambda: running.state.knows("raw"))
        began = running.state.begin_of("raw")
        end = running.source.end()
    room.send(second)
    with room.forwarder(clocks, begin="now") as running:
        running.until(lambda: running.done(10))
        assert running.state.begin_of("raw") == began
    assert began is not None
    assert began.position == end.position
    assert ids(room.there()) == ids(second)
