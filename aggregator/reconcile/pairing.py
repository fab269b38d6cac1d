"""Events of two sides, paired by what they say. Pure.

Polar shows neither the id that an event was sent with nor when it arrived, so an event is known there by its content:
name, customer, time and metadata, with numbers compared as the doubles that Polar keeps. Within a pool of windows that
differ, what is left over on both sides is paired again with less and less in common, and what it lacks is its cause.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple

from aggregator.reconcile.report import Cause
from meters.amount import parse_amount
from meters.event import USER
from meters.facts import RESERVED, Facts, Number


class Seen(NamedTuple):
    """An event as one side shows it. ``external_id``, ``ingested_at`` and ``place`` are known on our side alone.

    ``has_parent``: it belongs to another event, without which Polar does not list it.
    """

    name: str
    timestamp: datetime
    who: str
    content: str
    facts: Facts
    external_id: str = ""
    ingested_at: datetime | None = None
    place: str = ""
    is_named: bool = True  # ``who`` is an external id
    has_parent: bool = False

    @property
    def label(self) -> str:
        """What a person calls it."""
        known = f"{self.external_id}: " if self.external_id else ""
        return f"{known}{self.name} of {self.who}, {self.timestamp:%Y-%m-%d %H:%M:%S} UTC"


class Pair(NamedTuple):
    """Something that differs: ours, theirs, or two events that were meant to be one."""

    cause: Cause
    ours: Seen | None
    theirs: Seen | None


def seen(event: dict[str, Any], ingested_at: datetime | None = None, place: str = "") -> Seen:
    """An event of the feed or of an event list, decoded with exact decimals."""
    external, by_id = event.get("external_customer_id"), event.get("customer_id")
    who = str(external if external is not None else by_id)
    timestamp = datetime.fromisoformat(event["timestamp"])
    metadata = event.get("metadata") or {}
    found = Facts(
        name=event["name"], timestamp=timestamp, metadata={key: _value(key, value) for key, value in metadata.items()},
        external_customer_id=who, source=event.get("source", USER),
    )  # fmt: skip
    content = json.dumps({key: _loose(key, value) for key, value in metadata.items()}, sort_keys=True, default=str)
    external_id = event.get("external_id") or ""
    return Seen(
        event["name"], timestamp, who, content, found, external_id, ingested_at, place, external is not None,
        bool(event.get("parent_id")),
    )  # fmt: skip


def pair(ours: Sequence[Seen], theirs: Sequence[Seen]) -> list[Pair]:
    """Everything that is not on both sides alike, each with its cause."""
    missing, extra = _left_over(ours, theirs), _left_over(theirs, ours)
    pairs: list[Pair] = []
    moved = _match(missing, extra, lambda event: (event.name, event.who, event.content))
    pairs += [Pair(Cause.LATE, mine, other) for mine, other in moved]
    altered = _match(missing, extra, lambda event: (event.name, event.who, event.timestamp))
    pairs += [Pair(Cause.CHANGED, mine, other) for mine, other in altered]
    another = _match(missing, extra, lambda event: (event.name, event.timestamp, event.content))
    pairs += [Pair(Cause.CHANGED, mine, other) for mine, other in another]  # it counts for another customer
    pairs += [Pair(Cause.LOST, mine, None) for mine in missing]
    here = {key_of(event) for event in ours}
    pairs += [Pair(Cause.DOUBLED if key_of(other) in here else Cause.UNFOUNDED, None, other) for other in extra]
    return pairs


def key_of(event: Seen) -> tuple[Any, ...]:
    """What an event is known by."""
    return event.name, event.timestamp, event.who, event.content


def _left_over(events: Iterable[Seen], others: Iterable[Seen]) -> list[Seen]:
    there = Counter(key_of(event) for event in others)
    left = []
    for event in events:
        if there[key_of(event)]:
            there[key_of(event)] -= 1
        else:
            left.append(event)
    return left


def _match(missing: list[Seen], extra: list[Seen], key: Any) -> list[tuple[Seen, Seen]]:
    """Pairs with the same key; both lists lose them."""
    waiting: defaultdict[Any, list[Seen]] = defaultdict(list)
    for event in extra:
        waiting[key(event)].append(event)
    pairs, unpaired = [], []
    for event in missing:
        if waiting[key(event)]:
            pairs.append((event, waiting[key(event)].pop(0)))
        else:
            unpaired.append(event)
    missing[:] = unpaired
    extra[:] = [event for events in waiting.values() for event in events]
    return pairs


def _value(key: str, value: Any) -> Any:
    """As ``meters.facts`` reads it: reserved numbers may come as text."""
    if isinstance(value, dict):
        known, numbers = RESERVED.get(key, (frozenset(), frozenset()))
        return {name: _number(inner, name in numbers) for name, inner in value.items() if name in known}
    return _number(value, False)


def _number(value: Any, in_text: bool) -> Any:
    if isinstance(value, bool) or not (isinstance(value, int | Decimal) or (in_text and isinstance(value, str))):
        return value
    token = str(value)
    amount = parse_amount(token)
    return value if amount is None else Number(token, amount)


def _loose(key: str, value: Any) -> Any:
    """The value as a double would have it, and as the forwarder sends it: a reserved object has its known keys alone,
    those that say something, with numbers of twelve decimals."""
    if isinstance(value, dict):
        known, numbers = RESERVED.get(key, (value.keys(), frozenset()))
        return {
            name: _double(_rounded(inner)) if name in numbers else inner
            for name, inner in value.items() if name in known and inner is not None
        }  # fmt: skip
    return value if isinstance(value, bool | str) else _double(value)


def _rounded(value: Any) -> Any:
    amount = parse_amount(str(value))
    return value if amount is None else amount


def _double(value: Any) -> Any:
    try:
        return repr(float(value))
    except (TypeError, ValueError):
        return value
