"""The webhook outbox: causes, the messages made from them, and every delivery attempt.

    webhook_causes     whose usage or credits changed; the batch's transaction adds them, deleted once messages exist
    webhook_messages   one message to one endpoint, with its exact bytes, so that every attempt sends the same
    webhook_attempts   the delivery log

A message is pending until it is delivered, failed for good, or superseded. Of one customer's state only the newest is
worth sending, so an unreachable endpoint accumulates one message per customer and not one per change. A message that
was superseded before its first attempt is deleted. The batch's transaction adds causes; all other writes come from
the webhook sender. Each function is one step of a small transaction that the caller opens and commits.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

import duckdb
import pyarrow as pa

from meters.log import USAGE_CONTROL, USAGE_EVENTS
from meters.webhooks import EventType

Status = Literal["pending", "delivered", "failed", "superseded"]
CAUSES_AT_ONCE = 5_000
"""Causes taken in one transaction: a state takes about a tenth of a millisecond for each of its meters."""

MESSAGES_AT_ONCE = 20
"""Messages of one endpoint between two marks: what is told twice if the process dies meanwhile."""

KEPT = timedelta(days=30)
"""How long settled messages can be looked at and sent again, and how long a disabled endpoint's wait for it."""


class Cause(NamedTuple):
    """Who moved: a customer by id, or by the name that usage gives (``kind`` and ``text``, as in the directory).

    ``change`` is a threshold that was reached, or customers to look at again (``causes.Review``), as JSON.
    """

    number: int
    organization_id: str
    customer_id: str | None
    kind: str | None
    text: str | None
    change: str | None
    caused_at: datetime


class Message(NamedTuple):
    """What is told to one endpoint. ``id`` is the ``webhook-id``, the same for every attempt and for a redelivery.

    ``caused_at`` is since when the endpoint lacks it: a state that takes the place of another has that one's.
    """

    id: str
    endpoint_id: str
    organization_id: str
    type: str
    customer_id: str
    body: str
    caused_at: datetime
    created_at: datetime
    due_at: datetime
    attempts: int = 0
    status: Status = "pending"
    settled_at: datetime | None = None


class Attempt(NamedTuple):
    """One try. ``outcome`` says in a few words what came of it; a status code only where there was an answer."""

    id: str
    message_id: str
    endpoint_id: str
    organization_id: str
    number: int
    started_at: datetime
    took_ms: int
    status_code: int | None
    outcome: str


_MESSAGE = ", ".join(Message._fields)
_TIMES = frozenset({"caused_at", "created_at", "due_at", "settled_at", "started_at"})
_NUMBERS = frozenset({"attempts", "number", "took_ms", "status_code"})


def _schema(names: Sequence[str]) -> pa.Schema:
    kinds = {**dict.fromkeys(_TIMES, pa.timestamp("us")), **dict.fromkeys(_NUMBERS, pa.int32())}
    return pa.schema([(name, kinds.get(name, pa.string())) for name in names])


_COUNT_ON = """
    UPDATE webhook_messages SET attempts = tried.attempts, due_at = tried.due_at,
        caused_at = CASE tried.status WHEN 'pending' THEN caused_at ELSE created_at END
    FROM (
        SELECT given.endpoint_id, given.customer_id, given.type, given.due_at, given.status,
               CASE given.status WHEN 'pending' THEN given.attempts ELSE 0 END AS attempts
        FROM given JOIN webhook_messages was ON was.id = given.id AND was.endpoint_id = given.endpoint_id
        WHERE was.status = 'superseded'
    ) tried
    WHERE webhook_messages.status = 'pending' AND webhook_messages.type = tried.type
    AND webhook_messages.endpoint_id = tried.endpoint_id AND webhook_messages.customer_id = tried.customer_id"""
_MESSAGES, _ATTEMPTS = _schema(Message._fields), _schema(Attempt._fields)
Connection = duckdb.DuckDBPyConnection


class Stored(NamedTuple):
    """How far the store is: positions of ``usage.events`` by partition, and of ``usage.control``."""

    events: dict[int, int]
    control: int


def stored(connection: Connection) -> Stored:
    """How far the store is as of this transaction. Memory comes to the same place right after the commit."""
    rows = connection.execute("SELECT stream, log_partition, next_offset FROM positions").fetchall()
    events = {partition: offset for stream, partition, offset in rows if stream == USAGE_EVENTS}
    return Stored(events, max((offset for stream, _, offset in rows if stream == USAGE_CONTROL), default=0))


def take_causes(connection: Connection, resting: Collection[int] = ()) -> list[Cause]:
    """The oldest causes, in their order, without those of these numbers."""
    rows = connection.execute(
        """SELECT c.number, c.organization_id, c.customer_id, s.kind, s.text, c.change, c.caused_at
           FROM webhook_causes c LEFT JOIN subjects s ON s.number = c.subject
           WHERE c.number NOT IN (SELECT unnest(?::BIGINT[])) ORDER BY c.number LIMIT ?""",
        [list(resting), CAUSES_AT_ONCE],
    ).fetchall()
    return [Cause(*row) for row in rows]


def keep_causes(connection: Connection, customers: Mapping[int, str]) -> None:
    """Write down of whom these causes are: they stay, and their customer may go by another name by then."""
    connection.execute(
        """UPDATE webhook_causes SET customer_id = kept.customer_id
           FROM (SELECT unnest(?::BIGINT[]) AS number, unnest(?::VARCHAR[]) AS customer_id) kept
           WHERE webhook_causes.number = kept.number""",
        [list(customers), list(customers.values())],
    )


def put_messages(
    connection: Connection, messages: Sequence[Message], causes: Collection[int], under_way: Sequence[str] = ()
) -> None:
    """Write what was made of the causes of these numbers, and let go of those. Newer states supersede older ones.

    A state that says what the endpoint was told last is not told again: not everything that comes in changes something.
    A state that takes the place of one which could not be delivered so far has its attempts behind it and waits as
    long: else an endpoint that is away would be asked without a pause, and for ever, about a customer who moves often.
    And it is lacked as long as that one: else it would hold back the messages after it for as long as somebody moves.
    What was superseded without an attempt goes, except at endpoints with deliveries ``under_way``: it may be sent now.
    """
    messages = _news(connection, messages)
    if messages:
        with _as_table(connection, messages, _MESSAGES):
            connection.execute(
                """INSERT INTO webhook_messages
                   SELECT given.* REPLACE (
                       coalesce(older.attempts, given.attempts) AS attempts,
                       coalesce(older.due_at, given.due_at) AS due_at,
                       least(older.caused_at, given.caused_at, given.created_at) AS caused_at)
                   FROM given LEFT JOIN (
                       SELECT endpoint_id, customer_id, type, max(attempts) AS attempts, max(due_at) AS due_at,
                              min(caused_at) AS caused_at
                       FROM webhook_messages WHERE status = 'pending' AND type = 'customer.state_changed' GROUP BY ALL
                   ) older USING (endpoint_id, customer_id, type)"""
            )
            connection.execute(
                """UPDATE webhook_messages SET status = 'superseded', settled_at = given.created_at FROM given
                   WHERE webhook_messages.status = 'pending' AND given.type = 'customer.state_changed'
                   AND webhook_messages.type = given.type AND webhook_messages.endpoint_id = given.endpoint_id
                   AND webhook_messages.customer_id = given.customer_id AND webhook_messages.id <> given.id"""
            )
            connection.execute(
                """DELETE FROM webhook_messages WHERE status = 'superseded'
                   AND endpoint_id IN (SELECT endpoint_id FROM given WHERE NOT list_contains(?::VARCHAR[], endpoint_id))
                   AND NOT EXISTS (
                       SELECT 1 FROM webhook_attempts tried
                       WHERE tried.message_id = webhook_messages.id
                       AND tried.endpoint_id = webhook_messages.endpoint_id)""",
                [list(under_way)],
            )
    connection.execute("DELETE FROM webhook_causes WHERE number IN (SELECT unnest(?::BIGINT[]))", [list(causes)])


def _news(connection: Connection, messages: Sequence[Message]) -> Sequence[Message]:
    """Those that are no state of a customer, or another one than was written last for that endpoint.

    One that failed for good was not heard, so it is worth telling once more. Times of telling are no part of a state:
    bodies are compared from their data on, which stands last in them.
    """
    if not messages:
        return messages
    with _as_table(connection, messages, _MESSAGES):
        rows = connection.execute(
            """WITH last AS (
                   SELECT said.endpoint_id, said.customer_id, max_by(said.rowid, said.created_at) AS place
                   FROM webhook_messages said SEMI JOIN given USING (endpoint_id, customer_id, type)
                   WHERE said.type = 'customer.state_changed' GROUP BY ALL)
               SELECT given.id, given.endpoint_id FROM given JOIN last USING (endpoint_id, customer_id)
               JOIN webhook_messages said ON said.rowid = last.place
               WHERE given.type = 'customer.state_changed' AND said.status IN ('pending', 'delivered')
               AND substr(said.body, strpos(said.body, '"data":'))
                   = substr(given.body, strpos(given.body, '"data":'))"""
        ).fetchall()
    known = set(rows)
    return [message for message in messages if (message.id, message.endpoint_id) not in known]


@contextlib.contextmanager
def _as_table(connection: Connection, rows: Sequence[Message | Attempt], schema: pa.Schema) -> Iterator[None]:
    """Rows as the table ``given``: one statement for all of them, instead of one scan for each."""
    columns = zip(*rows, strict=True)
    arrays = [pa.array(list(column), field.type) for column, field in zip(columns, schema, strict=True)]
    connection.register("given", pa.table(arrays, schema=schema))
    try:
        yield
    finally:
        connection.unregister("given")


def pending(connection: Connection, endpoint_id: str, parked_before: tuple[datetime, datetime] | None = None,
            ) -> list[Message]:
    """The next messages of each type for an endpoint, oldest first, due or not.

    Except, with ``parked_before`` (an age and the present), those lacked since before the one and not due at the other:
    nobody waits for them any more.
    """
    lacked, due = parked_before or (None, None)
    rows = connection.execute(
        f"""SELECT {_MESSAGE} FROM webhook_messages WHERE status = 'pending' AND endpoint_id = $endpoint
            AND ($lacked IS NULL OR caused_at >= $lacked OR due_at <= $due)
            QUALIFY row_number() OVER (PARTITION BY type ORDER BY created_at, rowid) <= {MESSAGES_AT_ONCE}
            ORDER BY created_at, rowid""",  # noqa: S608 (our columns)
        {"endpoint": endpoint_id, "lacked": lacked, "due": due},
    ).fetchall()
    return [Message(*row) for row in rows]


def waiting(connection: Connection, now: datetime) -> list[str]:
    """The endpoints for which a message is due, the one that waits longest first."""
    rows = connection.execute(
        """SELECT endpoint_id FROM webhook_messages WHERE status = 'pending' AND due_at <= ?
           GROUP BY endpoint_id ORDER BY min(due_at)""",
        [now],
    ).fetchall()
    return [row[0] for row in rows]


def mark(connection: Connection, messages: Sequence[Message], attempts: Sequence[Attempt]) -> None:
    """Write down what became of messages, and the attempts that were made.

    A message that was superseded while it was being sent stays so, unless it was delivered after all or failed for
    good; what came of it counts for the one in its place, too.
    """
    if messages:
        with _as_table(connection, messages, _MESSAGES):
            connection.execute(_COUNT_ON)
            connection.execute(
                """UPDATE webhook_messages SET status = given.status, attempts = given.attempts, due_at = given.due_at,
                   settled_at = given.settled_at FROM given
                   WHERE webhook_messages.id = given.id AND webhook_messages.endpoint_id = given.endpoint_id
                   AND (webhook_messages.status = 'pending' OR given.status IN ('delivered', 'failed'))"""
            )
    if attempts:
        with _as_table(connection, attempts, _ATTEMPTS):
            connection.execute("INSERT INTO webhook_attempts SELECT * FROM given")


def failures_in_a_row(connection: Connection, endpoint_id: str, since: datetime, most: int) -> int:
    """How many of the newest settled messages failed since a time, one after the other, up to ``most``."""
    rows = connection.execute(
        """SELECT status FROM webhook_messages WHERE endpoint_id = ? AND status IN ('delivered', 'failed')
           AND settled_at >= ? ORDER BY settled_at DESC LIMIT ?""",
        [endpoint_id, since, most],
    ).fetchall()
    return next((place for place, (status,) in enumerate(rows) if status != "failed"), len(rows))


def oldest_pending(connection: Connection) -> dict[str, datetime]:
    """When the oldest pending message of each endpoint was made."""
    rows = connection.execute(
        "SELECT endpoint_id, min(created_at) FROM webhook_messages WHERE status = 'pending' GROUP BY endpoint_id"
    ).fetchall()
    return dict(rows)


def forget(connection: Connection, now: datetime, long_disabled: Sequence[str]) -> None:
    """Let go of what was settled long ago, and of its attempts; give up what waits for endpoints disabled as long ago.

    A message stays for as long as one of its attempts, which is listed with it.
    """
    connection.execute(
        """UPDATE webhook_messages SET status = 'failed', settled_at = ?
           WHERE status = 'pending' AND list_contains(?::VARCHAR[], endpoint_id)""",
        [now, list(long_disabled)],
    )
    connection.execute("DELETE FROM webhook_attempts WHERE started_at < ?", [now - KEPT])
    connection.execute(
        """DELETE FROM webhook_messages WHERE settled_at < ? AND NOT EXISTS (
               SELECT 1 FROM webhook_attempts tried
               WHERE tried.message_id = webhook_messages.id AND tried.endpoint_id = webhook_messages.endpoint_id)""",
        [now - KEPT],
    )


def deliver_again(
    connection: Connection, organization_id: str, message_id: str, endpoint_ids: Sequence[str], now: datetime
) -> int:
    """Make a message due now at those of these endpoints that it was for, whatever became of it; how many they are."""
    found = connection.execute(
        """UPDATE webhook_messages SET status = 'pending', attempts = 0, due_at = ?, settled_at = NULL
           WHERE organization_id = ? AND id = ? AND list_contains(?::VARCHAR[], endpoint_id)""",
        [now, organization_id, message_id, list(endpoint_ids)],
    ).fetchone()
    return found[0] if found else 0


def told_before(connection: Connection, organization_id: str) -> set[str]:
    """The customers of whom an organization was told anything that is kept."""
    rows = connection.execute(
        "SELECT DISTINCT customer_id FROM webhook_messages WHERE organization_id = ?", [organization_id]
    ).fetchall()
    return {row[0] for row in rows}


def not_taken(connection: Connection, endpoint_id: str) -> set[str]:
    """The customers whose newest settled message an endpoint did not take."""
    rows = connection.execute(
        """SELECT customer_id FROM webhook_messages WHERE endpoint_id = ? AND status IN ('delivered', 'failed')
           GROUP BY customer_id HAVING max_by(status, settled_at) = 'failed'""",
        [endpoint_id],
    ).fetchall()
    return {row[0] for row in rows}


def offer_again(connection: Connection, endpoint_id: str, type: str, now: datetime) -> None:
    """Make messages of a type due now that an endpoint did not take since it took anything last."""
    connection.execute(
        """UPDATE webhook_messages SET status = 'pending', attempts = 0, due_at = $now, settled_at = NULL
           WHERE endpoint_id = $endpoint AND type = $type AND status = 'failed' AND settled_at >= coalesce((
               SELECT max(settled_at) FROM webhook_messages WHERE endpoint_id = $endpoint AND status = 'delivered'
           ), settled_at)""",
        {"endpoint": endpoint_id, "type": type, "now": now},
    )


def known(connection: Connection, endpoint_id: str, type: str) -> set[str]:
    """The ids of the messages of a type that were made for an endpoint."""
    rows = connection.execute(
        "SELECT id FROM webhook_messages WHERE endpoint_id = ? AND type = ?", [endpoint_id, type]
    ).fetchall()
    return {row[0] for row in rows}


def knows(connection: Connection, organization_id: str, message_id: str) -> bool:
    """Whether the organization has such a message."""
    row = connection.execute(
        "SELECT 1 FROM webhook_messages WHERE organization_id = ? AND id = ? LIMIT 1", [organization_id, message_id]
    ).fetchone()
    return row is not None


class Sought(NamedTuple):
    """Which attempts of the delivery log; None restricts nothing. Times are exclusive, and as the store writes them.

    ``code_class`` is the first digit of a status code; ``text`` stands in the attempt's id, the message's or the code.
    """

    organization_id: str
    endpoint_ids: Sequence[str] | None = None
    types: Sequence[EventType] | None = None
    after: datetime | None = None
    before: datetime | None = None
    succeeded: bool | None = None
    code_class: int | None = None
    text: str | None = None


_HOLDS = {
    "organization_id": "a.organization_id = $organization_id",
    "endpoint_ids": "list_contains($endpoint_ids::VARCHAR[], a.endpoint_id)",
    "types": "list_contains($types::VARCHAR[], m.type)",
    "after": "a.started_at > $after",
    "before": "a.started_at < $before",
    "succeeded": "coalesce(a.status_code BETWEEN 200 AND 299, FALSE) = $succeeded",
    "code_class": "a.status_code // 100 = $code_class",
    "text": "contains(lower(concat_ws(' ', a.id, a.message_id, a.status_code)), lower($text))",
}


def deliveries(connection: Connection, sought: Sought, limit: int, offset: int) -> tuple[list[dict[str, Any]], int]:
    """A page of the delivery log, newest first, each attempt with its message; and how many there are."""
    asked = {name: value for name, value in sought._asdict().items() if value is not None}
    found = f"""FROM webhook_attempts a JOIN webhook_messages m ON m.id = a.message_id AND m.endpoint_id = a.endpoint_id
            WHERE {" AND ".join(_HOLDS[name] for name in asked)}"""
    row = connection.execute(f"SELECT count(*) {found}", asked).fetchone()
    cursor = connection.execute(
        f"""SELECT a.*, m.type, m.customer_id, m.status, m.body, m.created_at AS made_at, m.settled_at {found}
            ORDER BY a.started_at DESC, a.number DESC LIMIT $limit OFFSET $offset""",
        asked | {"limit": limit, "offset": min(offset, 2**62)},
    )
    names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()], row[0] if row else 0
