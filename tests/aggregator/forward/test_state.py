"""The books of forwarding: every event that was taken is accepted, waits, or is a dead letter, at every moment."""

import contextlib
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.forward.planner import Item, Reached
from aggregator.forward.sqlite_errors import Unusable, explaining
from aggregator.forward.state import WAITING, ForwardingMetrics, State
from tests.support.faults.small_disk import SmallDisk

NOW_US = 1_800_000_000_000_000
FATES = st.lists(st.lists(st.sampled_from(["accepted", "parked", "condemned"]), min_size=1, max_size=5), max_size=8)


def item(number: int, lane: str = "raw") -> Item:
    """An item at a place of its own."""
    return Item(
        lane=lane, external_id=f"e{number}", who="e:ann", timestamp_us=NOW_US, ingested_us=NOW_US, body=b"{}",
        offset=number,
    )  # fmt: skip


def decide(one: Item, fate: str) -> Item:
    """The item with its fate."""
    one.due_us = NOW_US + 5 if fate == "parked" else 0
    one.condemned = "no" if fate == "condemned" else ""
    return one


def balance(state: State) -> tuple[int, int]:
    """What was taken, and what became of it."""
    tallies = state.tallies().get("raw", {})
    return tallies.get("taken", 0), tallies.get("accepted", 0) + tallies.get("dead", 0) + state.waiting()[0]


@settings(max_examples=40, deadline=None)
@given(slices=FATES, later=st.lists(st.sampled_from(["accepted", "parked", "condemned"]), max_size=40))
def test_the_books_balance(tmp_path_factory: pytest.TempPathFactory, slices: list[list[str]], later: list[str]) -> None:
    """Whatever becomes of events at first, and of those that waited at last; a place is passed once."""
    state = State(tmp_path_factory.mktemp("state") / "forward.sqlite")
    number = 0
    for fates in slices:
        state.mark("raw", [decide(item(number + n), fate) for n, fate in enumerate(fates)], None, NOW_US)
        number += len(fates)
        assert balance(state) == (number, number)
        assert state.position("raw") == {0: (number - 1, 1)}
    for fate in later:
        waiting = state.due(NOW_US + 5, 1)
        if waiting:
            state.mark(WAITING, [decide(waiting[0], fate)], None, NOW_US)
        assert balance(state) == (number, number)
    assert len(state.dead()) == state.tallies().get("raw", {}).get("dead", 0)
    state.close()


def test_where_a_lane_began_is_kept(tmp_path: Path) -> None:
    """However far it goes, and whoever says later that it begins; of one that was never told to, nobody knows it."""
    state = State(tmp_path / "forward.sqlite")
    state.begin("raw", Reached({0: (7, 0)}, {}), NOW_US)
    state.mark("raw", [item(9)], None, NOW_US)
    state.begin("raw", Reached({0: (1, 0)}, {}), NOW_US + 1)
    state.mark("rollup", [], Reached({0: (3, 0)}, {}), NOW_US)
    state.begin("rollup", Reached({}, {}), NOW_US)

    assert (state.begin_of("raw"), state.position("raw")) == (({0: (7, 0)}, NOW_US), {0: (9, 1)})
    assert (state.begin_of("rollup"), state.position("rollup")) == (None, {0: (3, 0)})
    state.close()


def test_a_dead_letter_that_is_accepted_later_is_none_any_more(tmp_path: Path) -> None:
    """By whichever way it went: the lane that lost it has it back, and the replay has its own books."""
    state = State(tmp_path / "forward.sqlite")
    state.mark("raw", [decide(item(0), "condemned"), item(1)], None, NOW_US)
    state.mark("replay 1", [item(0, "replay 1"), decide(item(1, "replay 1"), "condemned")], None, NOW_US)
    assert state.tallies()["raw"] == {"taken": 2, "accepted": 2, "dead": 0}
    assert state.tallies()["replay 1"] == {"taken": 2, "accepted": 1, "dead": 1}
    assert [letter.external_id for letter in state.dead()] == ["e1"]
    state.close()


def test_a_customers_events_leave_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    """Waiting ones too, and none before its time."""
    state = State(tmp_path / "forward.sqlite")
    some = [item(n) for n in range(4)]
    for place, one in enumerate(some):
        one.due_us = NOW_US + (place // 2) * 10
    state.mark("raw", some, None, NOW_US)
    assert [one.external_id for one in state.due(NOW_US, 10)] == ["e0", "e1"]
    assert [one.external_id for one in state.due(NOW_US + 10, 3)] == ["e0", "e1", "e2"]
    assert state.waiting_customers() == {"e:ann": NOW_US + 10}
    state.close()


def test_an_event_waits_for_its_customers_earlier_ones(tmp_path: Path) -> None:
    """Also where it was due before them, as when Polar's clock was found further behind since; nobody else does."""
    state = State(tmp_path / "forward.sqlite")
    first, second, other = item(0), item(1), msgspec.structs.replace(item(2), who="e:bob")
    for one, after_us in ((first, 1), (second, 2), (other, 2)):
        one.due_us = NOW_US + after_us
    state.mark("raw", [first, second, other], None, NOW_US)
    (again,) = state.due(NOW_US + 1, 10)
    again.due_us = NOW_US + 9
    state.mark(WAITING, [again], None, NOW_US + 1)
    assert [one.external_id for one in state.due(NOW_US + 8, 10)] == ["e2"]
    assert [one.external_id for one in state.due(NOW_US + 9, 10)] == ["e0", "e1", "e2"]
    state.close()


def test_a_customer_who_is_held_is_alone_and_without_rollups(tmp_path: Path) -> None:
    """Those have no order that could be broken."""
    state = State(tmp_path / "forward.sqlite")
    other = msgspec.structs.replace(item(1), who="e:bob")
    state.mark("raw", [decide(item(0), "parked"), decide(other, "parked")], None, NOW_US)
    state.mark("rollup", [decide(item(2, "rollup"), "parked")], None, NOW_US)
    state.hold("e:ann", NOW_US + 9)
    assert [one.external_id for one in state.due(NOW_US + 5, 10)] == ["e1", "e2"]
    assert [one.external_id for one in state.due(NOW_US + 9, 10)] == ["e0", "e1", "e2"]
    state.close()


def test_each_server_has_books_of_its_own(tmp_path: Path) -> None:
    """The first one that is named has what there is; another begins with nothing, and those that were left stay."""
    state = State(tmp_path / "forward.sqlite")
    behind = Reached({0: (7, 0)}, {})
    state.mark("raw", [item(0), decide(item(1), "parked"), decide(item(2), "condemned")], behind, NOW_US)
    state.ask_replay("2026-03-01T00:00:00Z", "2026-03-02T00:00:00Z", NOW_US)

    def books() -> list[object]:
        waiting = state.due(NOW_US + 5, 10)
        return [state.position("raw"), state.tallies(), state.waiting(), waiting, state.dead(), state.replays()]

    first = books()
    assert state.turn_to("https://sandbox.example") is None
    assert books() == first
    state.set(pending=0, taken_last={"external_id": "e0", "body": "{}"})
    assert state.turn_to("https://production.example") == "https://sandbox.example"
    assert books() == [{}, {}, (0, None), [], [], []]
    assert not {"pending", "taken_last"} & state.flags().keys()
    state.mark("raw", [decide(item(0), "parked")], None, NOW_US)
    assert state.ask_replay("2026-03-01T00:00:00Z", "2026-03-02T00:00:00Z", NOW_US) == 2
    second = books()
    assert state.turn_to("https://production.example") is None
    for server, known in (("https://sandbox.example", first), ("https://production.example", second)):
        state.turn_to(server)
        assert books() == known
    state.close()


def test_the_file_is_its_owners(tmp_path: Path) -> None:
    """A token is in it: nobody else may read it, nor what SQLite keeps beside it."""
    state = State(tmp_path / "forward.sqlite")
    state.set(feed_token={"secret": "hush"})
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    state.close()


def damaged(state: State, place: Path) -> None:
    """Whole pages of it are none any more, but its first is."""
    state.mark("raw", [decide(item(number), "condemned") for number in range(2_000)], None, NOW_US)
    state.close()
    pages = place.stat().st_size // 4096
    with place.open("r+b") as file:
        file.seek(4096 * (pages // 2))
        file.write(b"\xff" * (4096 * (pages // 2)))


def test_a_damaged_file_says_so_and_what_heals_it(tmp_path: Path) -> None:
    """Whether it is seen at once or only where all of it is read."""
    none, partly = tmp_path / "none.sqlite", tmp_path / "partly.sqlite"
    none.write_bytes(b"this is no database " * 500)
    damaged(State(partly), partly)
    with pytest.raises(Unusable, match=r"none.sqlite is damaged .*: stop everything and restore it") as seen:
        State(none)
    assert seen.value.is_damaged
    with contextlib.closing(State(partly)) as state, pytest.raises(Unusable, match=r"partly.sqlite is damaged"):
        state.read_through()


def test_a_file_that_cannot_be_had_is_not_damaged(tmp_path: Path) -> None:
    """Its directory is away, or its place is taken: nothing is to be replaced."""
    (tmp_path / "taken").mkdir()
    for path in (tmp_path / "away" / "forward.sqlite", tmp_path / "taken"):
        with pytest.raises(Unusable, match=r"cannot be used now .*: make room on its disk, or run this as") as seen:
            State(path)
        assert not seen.value.is_damaged


def test_a_full_disk_is_said_and_heals(disk: SmallDisk) -> None:
    """However much was to be written: nothing of it is, the cause is told as it is, and with room all goes on."""
    with contextlib.closing(State(disk.path / "forward.sqlite")) as state:
        state.mark("raw", [item(0)], None, NOW_US)
        disk.fill(leave_kib=1024)
        large = [decide(item(number), "condemned") for number in range(1, 3_000)]
        for one in large:
            one.body = b"x" * 3_000
        with pytest.raises(Unusable, match=r"cannot be used now \(.*full\): make room"), explaining(disk.path):
            state.mark("raw", large, None, NOW_US)
        assert (balance(state), state.position("raw")) == ((1, 1), {0: (0, 1)})
        disk.empty()
        state.mark("raw", large, None, NOW_US)
        assert balance(state) == (3_000, 3_000)


def flagged(value: str) -> Callable[[Path], None]:
    """A file in which a flag is this."""

    def write(path: Path) -> None:
        with contextlib.closing(State(path)) as state:
            state.set(seen_us=1)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
            file.execute("UPDATE flags SET value = CAST(? AS TEXT)", [value.encode("latin-1")])

    return write


@pytest.mark.parametrize("write", [
    lambda path: path.write_bytes(b"this is no database " * 500),
    flagged('"yesterday"'), flagged("yesterday"),
], ids=["garbage", "kind", "json"])  # fmt: skip
def test_whatever_lies_in_the_file_costs_no_other_metric(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """All that is said is that somebody has to do something, which is what the alert asks for."""
    write(tmp_path / "forward.sqlite")
    found = {family.name: family.samples for family in ForwardingMetrics(tmp_path / "forward.sqlite").collect()}
    assert [sample.value for sample in found["meterstream_forward_stopped"]] == [1.0]


def test_a_forwarder_that_is_away_is_seen_by_its_silence(tmp_path: Path) -> None:
    """The age of what is unsent grows from its last sign of life on; before anything was forwarded nothing is said."""
    metrics = ForwardingMetrics(tmp_path / "forward.sqlite")
    assert list(metrics.collect()) == []
    state = State(tmp_path / "forward.sqlite")
    state.set(seen_us=1_700_000_000_000_000, pending=0, window_s=3600)
    found = {family.name: family.samples for family in metrics.collect()}
    (oldest,) = found["meterstream_forward_oldest_unsent_seconds"]
    assert oldest.value > 10_000_000
    assert [sample.value for sample in found["meterstream_forward_window_seconds"]] == [3600]
    state.close()
