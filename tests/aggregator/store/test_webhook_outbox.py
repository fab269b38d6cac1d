"""What is told to endpoints, as it stands in the store: what takes the place of what, and what is left to be sent."""

from collections.abc import Iterator
from datetime import datetime, timedelta

import duckdb
import pytest

from aggregator.store import database, webhook_outbox
from aggregator.store.webhook_outbox import Attempt, Message, Status

NOON = datetime(2026, 3, 1, 12)  # noqa: DTZ001 (as the store writes times)
SOON = NOON + timedelta(seconds=2)


@pytest.fixture
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    """A store of its own, empty."""
    with duckdb.connect() as made:
        made.execute(database.TABLES)
        yield made


def state(id: str, balance: int = 0, at: datetime = NOON, customer: str = "ann") -> Message:
    """A customer's state as it is told to the only endpoint."""
    stamp = f'"timestamp":"{at.isoformat()}Z"'
    body = f'{{"type":"customer.state_changed",{stamp},"data":{{"balance":{balance}}}}}'
    return Message(
        id=id, endpoint_id="hook", organization_id="ours", type="customer.state_changed", customer_id=customer,
        body=body, caused_at=at, created_at=at, due_at=at,
    )  # fmt: skip


def statuses(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """What became of every message."""
    return dict(connection.execute("SELECT id, status FROM webhook_messages").fetchall())


def waits(connection: duckdb.DuckDBPyConnection) -> list[tuple[str, int, datetime]]:
    """What is left to be sent: the message, the attempts behind it, and when it is due."""
    return [(one.id, one.attempts, one.due_at) for one in webhook_outbox.pending(connection, "hook")]


def tried(message: Message) -> Attempt:
    """An attempt that was made for a message, and failed."""
    return Attempt(f"try {message.id}", message.id, "hook", "ours", 1, message.created_at, 1, 500, "answered 500")


@pytest.mark.parametrize(
    ("outcomes", "in_a_row"),
    [("f" * 10 + "df", 1), ("f" * 10, 10), ("d" + "f" * 3, 3), ("f" * 3 + "d", 0), ("", 0), ("f" * 12, 10)],
)
def test_failures_in_a_row_are_the_newest(
    connection: duckdb.DuckDBPyConnection, outcomes: str, in_a_row: int
) -> None:
    """Since an endpoint last worked, which it did if a message was delivered after them; no more than asked for."""
    messages = [state(str(place), place, customer=str(place)) for place in range(len(outcomes))]
    webhook_outbox.put_messages(connection, messages, [])
    for place, (message, outcome) in enumerate(zip(messages, outcomes, strict=True)):
        status: Status = "failed" if outcome == "f" else "delivered"
        settled_at = NOON + timedelta(seconds=place)
        webhook_outbox.mark(connection, [message._replace(status=status, settled_at=settled_at)], [])
    assert webhook_outbox.failures_in_a_row(connection, "hook", NOON, 10) == in_a_row
    assert webhook_outbox.failures_in_a_row(connection, "hook", NOON + timedelta(hours=1), 10) == 0


def test_a_newer_state_waits_as_the_one_whose_place_it_takes(connection: duckdb.DuckDBPyConnection) -> None:
    """Its attempts are counted on, whoever else is told in between; another customer's begin at none."""
    later = NOON + timedelta(seconds=1)
    webhook_outbox.put_messages(connection, [state("a")], [])
    webhook_outbox.mark(connection, [state("a")._replace(attempts=3, due_at=SOON)], [tried(state("a"))])
    webhook_outbox.put_messages(connection, [state("b", 1, later), state("c", 1, later, "bob")], [])
    assert statuses(connection) == {"a": "superseded", "b": "pending", "c": "pending"}
    assert waits(connection) == [("b", 3, SOON), ("c", 0, later)]


@pytest.mark.parametrize(
    ("outcome", "became", "attempts", "due_at"),
    [("pending", "superseded", 4, SOON), ("failed", "failed", 0, NOON), ("delivered", "delivered", 0, NOON)],
)
def test_what_comes_of_a_message_under_way_counts_for_the_one_in_its_place(
    connection: duckdb.DuckDBPyConnection, outcome: Status, became: str, attempts: int, due_at: datetime
) -> None:
    """A failure is one more attempt of both; after the last one, and after a delivery, counting begins again."""
    first = state("a")._replace(attempts=3)
    webhook_outbox.put_messages(connection, [first], [])
    webhook_outbox.put_messages(connection, [state("b", 1)], [], ["hook"])  # while the first is being sent
    marked = first._replace(attempts=4, status=outcome, due_at=SOON if outcome == "pending" else first.due_at)
    webhook_outbox.mark(connection, [marked], [])
    assert statuses(connection) == {"a": became, "b": "pending"}
    assert waits(connection) == [("b", attempts, due_at)]


@pytest.mark.parametrize(
    ("outcome", "balance", "is_told"),
    [("delivered", 0, False), ("pending", 0, False), ("failed", 0, True), ("delivered", 1, True)],
)
def test_what_an_endpoint_was_told_last_is_not_told_again(
    connection: duckdb.DuckDBPyConnection, outcome: Status, balance: int, is_told: bool
) -> None:
    """Only if it was not heard, or says something else; another customer's state is no matter."""
    webhook_outbox.put_messages(connection, [state("a"), state("b", 1, customer="bob")], [])
    webhook_outbox.mark(connection, [state("a")._replace(status=outcome)], [])
    webhook_outbox.put_messages(connection, [state("c", balance, SOON)], [])
    assert ("c" in statuses(connection)) is is_told


def test_a_state_that_comes_back_is_told(connection: duckdb.DuckDBPyConnection) -> None:
    """What is to be told last counts, and not what was to be told before."""
    for id, balance in (("a", 0), ("b", 1), ("c", 0), ("d", 0)):
        seconds = len(statuses(connection))
        webhook_outbox.put_messages(connection, [state(id, balance, NOON + timedelta(seconds=seconds))], [])
    assert statuses(connection) == {"c": "pending"}


@pytest.mark.parametrize(
    ("outcome", "lacked_since"), [("pending", NOON), ("failed", SOON), ("delivered", SOON)]
)  # fmt: skip
def test_a_newer_state_is_lacked_as_long_as_the_one_whose_place_it_takes(
    connection: duckdb.DuckDBPyConnection, outcome: Status, lacked_since: datetime
) -> None:
    """Until the endpoint heard that one after all, or it failed for good. When each was made is no matter."""
    webhook_outbox.put_messages(connection, [state("a")], [])
    webhook_outbox.put_messages(connection, [state("b", 1, SOON)], [], ["hook"])
    webhook_outbox.mark(connection, [state("a")._replace(attempts=1, status=outcome)], [])
    assert [(one.id, one.caused_at, one.created_at) for one in webhook_outbox.pending(connection, "hook")] == [
        ("b", lacked_since, SOON)
    ]  # fmt: skip
    assert [one.id for one in webhook_outbox.pending(connection, "hook", (SOON, NOON - timedelta(days=1)))] == (
        ["b"] if lacked_since == SOON else []
    )  # fmt: skip


def test_a_superseded_state_that_nobody_tried_to_send_is_let_go_of(connection: duckdb.DuckDBPyConnection) -> None:
    """One that was tried is in the delivery log, and one that may be under way stays until it is known not to be."""
    webhook_outbox.put_messages(connection, [state("a")], [])
    webhook_outbox.mark(connection, [state("a")._replace(attempts=1)], [tried(state("a"))])
    webhook_outbox.put_messages(connection, [state("b", 1), state("c", 1, customer="bob")], [])
    webhook_outbox.put_messages(connection, [state("d", 2)], [], ["hook"])
    assert statuses(connection) == {"a": "superseded", "b": "superseded", "c": "pending", "d": "pending"}
    webhook_outbox.put_messages(connection, [state("e", 3)], [], ["another"])
    assert statuses(connection) == {"a": "superseded", "c": "pending", "e": "pending"}


def cause(connection: duckdb.DuckDBPyConnection, number: int) -> None:
    """Usage of somebody whom the application calls ann."""
    connection.execute("INSERT INTO webhook_causes VALUES (?, 'ours', 7, NULL, NULL, ?)", [number, NOON])


def test_a_cause_stays_until_something_was_made_of_it(connection: duckdb.DuckDBPyConnection) -> None:
    """One that is left for later says of whom it is, and is passed over when that is wished."""
    connection.execute("INSERT INTO subjects VALUES (7, 1, 'external', 'ann')")
    for number in (1, 2, 3):
        cause(connection, number)
    webhook_outbox.keep_causes(connection, {2: "id of ann"})
    webhook_outbox.put_messages(connection, [], {1})
    assert [(one.number, one.customer_id, one.text) for one in webhook_outbox.take_causes(connection)] == [
        (2, "id of ann", "ann"), (3, None, "ann")
    ]  # fmt: skip
    assert [one.number for one in webhook_outbox.take_causes(connection, resting=[2])] == [3]


def test_what_waits_for_endpoints_that_were_disabled_long_ago_is_given_up(
    connection: duckdb.DuckDBPyConnection,
) -> None:
    """What waits for others stays, and a message stays for as long as an attempt that is listed with it."""
    mine, other = state("a"), state("b")._replace(endpoint_id="other")
    late = NOON + webhook_outbox.KEPT + timedelta(seconds=1)
    attempt = Attempt("try", "a", "hook", "ours", 1, late - timedelta(days=1), 1, 500, "answered 500")
    webhook_outbox.put_messages(connection, [mine, other], [])
    webhook_outbox.forget(connection, NOON, ["hook"])
    assert statuses(connection) == {"a": "failed", "b": "pending"}
    webhook_outbox.mark(connection, [], [attempt])
    webhook_outbox.forget(connection, late, [])
    assert statuses(connection) == {"a": "failed", "b": "pending"}
    webhook_outbox.forget(connection, late + webhook_outbox.KEPT, [])
    assert statuses(connection) == {"b": "pending"}
