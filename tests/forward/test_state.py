"""The books of forwarding: every event that was taken is accepted, waits, or is a dead letter, at every moment."""

import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator.forward.metrics import ForwardingMetrics
from aggregator.forward.planner import Item
from aggregator.forward.state import WAITING, State

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
    """However far it goes, and whoever says later that it begins; of a lane of an earlier version nobody knows it."""
    state = State(tmp_path / "forward.sqlite")
    state.begin("raw", {0: (7, 0)}, NOW_US)
    state.mark("raw", [item(9)], None, NOW_US)
    state.begin("raw", {0: (1, 0)}, NOW_US + 1)
    state.mark("rollup", [], {0: (3, 0)}, NOW_US)
    state.begin("rollup", {}, NOW_US)

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


def test_each_server_has_books_of_its_own(tmp_path: Path) -> None:
    """The first one that is named has what there is; another begins with nothing, and those that were left stay."""
    state = State(tmp_path / "forward.sqlite")
    state.mark("raw", [item(0), decide(item(1), "parked"), decide(item(2), "condemned")], {0: (7, 0)}, NOW_US)
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
