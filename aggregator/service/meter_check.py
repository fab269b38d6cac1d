"""Warnings about a meter that counts less than its author may think.

``look`` finds what a meter passes over in recent events, and ``warnings`` says it in words: names and metadata keys
that no recent event has, with the names and keys that were seen, and values that are no numbers. A warning changes
nothing: the meter counts as it says. ``uncounted`` is the part of the answer that counts such events.
"""

import difflib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from aggregator.service import answers
from aggregator.service.service import Here
from aggregator.store.queries import unmatched
from aggregator.store.queries.scope import NOBODY, Scope
from aggregator.store.queries.unmatched import RECENT, Seen, Unmatched
from aggregator.store.queries.usage import Question
from meters import exact
from meters.aggregation import Aggregation
from meters.event import event_id
from meters.event_values import NAME, is_built_in, lookup, path_of
from meters.filters import Clause, Filter, Operator
from meters.meter import Meter

SHOWN_MAX = 10  # names or keys in a warning: more are not read
LOOK_KEPT = timedelta(minutes=1)  # a look reads a week of events: 0.2 s at a million
LOOKS_MAX = 1_000  # meters that are remembered, of all organizations; beyond it a meter is looked at again
WARNINGS_MAX = 5  # of one kind: whoever has more has one cause
DAYS = f"the last {RECENT.days} days with events"


class Look(NamedTuple):
    """What recent events say about a meter; ``seen`` is None where there are no recent events."""

    unmatched: Unmatched
    seen: Seen | None


class Looks:
    """The newest look at each meter, so that a meter that is read again and again costs a store query a minute."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[Meter, datetime, Look | None]] = OrderedDict()

    def find(self, meter: Meter, now: datetime) -> Look | None:
        """Return what was found by this definition of the meter less than a minute ago. Raises KeyError.

        None stands for a look that took too long.
        """
        looked, at, found = self._kept[meter.id]
        if looked is not meter or not timedelta() <= now - at < LOOK_KEPT:
            raise KeyError(meter.id)
        return found

    def keep(self, meter: Meter, now: datetime, found: Look | None) -> None:
        """Keep what was found, and forget the oldest look beyond LOOKS_MAX."""
        self._kept.pop(meter.id, None)
        self._kept[meter.id] = meter, now, found
        while len(self._kept) > LOOKS_MAX:
            self._kept.popitem(last=False)


def look(here: Here, filter: Filter, aggregation: Aggregation) -> Look:
    """Look through the organization's recent events."""
    since = unmatched.recent(here.connection, here.organization)
    if since is None:
        return Look(Unmatched(), None)
    scope = here.within(Scope(organization=NOBODY, arrived_since=since))
    question = Question(filter=filter, aggregation=aggregation, scope=scope)
    return Look(unmatched.unmatched(here.connection, question), unmatched.seen(here.connection, scope, filter))


def uncounted(found: Unmatched) -> answers.Uncounted:
    """Matching events that add nothing, as an answer."""
    if found.example is None:
        return answers.Uncounted(found.no_number, found.absent, None)
    one = found.example
    example = answers.UncountedExample(event_id(one.id_hi, one.id_lo), one.timestamp, one.name, one.value)
    return answers.Uncounted(found.no_number, found.absent, example)


def warnings(filter: Filter, aggregation: Aggregation, found: Look) -> list[str]:
    """What the meter's author should know, a sentence or two each."""
    said = list(_about_names(filter, found.seen)) if found.seen else []
    if found.seen and found.seen.metadata:
        said += _about_keys(filter, aggregation, found.seen.metadata)
    if found.unmatched.example:
        said.append(_about_values(aggregation, found.unmatched))
    return said


def _clauses(filter: Filter) -> Iterator[Clause]:
    for part in filter.clauses:
        if isinstance(part, Filter):
            yield from _clauses(part)
        else:
            yield part


def _about_names(filter: Filter, seen: Seen) -> Iterator[str]:
    if not seen.is_every_name:
        return
    asked = [clause for clause in _clauses(filter) if clause.property == NAME]
    equal = [clause.value for clause in asked if clause.operator in (Operator.EQ, Operator.IN)]
    values = [one for value in equal for one in (value if isinstance(value, list) else [value])]
    unknown = [value for value in dict.fromkeys(values) if isinstance(value, str) and value not in seen.names]
    for name in unknown[:WARNINGS_MAX]:
        yield f"No event of {DAYS} is named {name!r}{_meant(name, seen.names, 'Names')}"


def _about_keys(filter: Filter, aggregation: Aggregation, texts: Sequence[str]) -> Iterator[str]:
    sample = [exact.decode_tokens(text.encode()) for text in texts]
    asked = [clause.property for clause in _clauses(filter) if clause.operator is not Operator.EXISTS]
    asked = [property for property in asked if not is_built_in(property)]
    if aggregation.property and (aggregation.func == "unique" or not is_built_in(aggregation.property)):
        asked.append(aggregation.property)
    unknown = [
        property for property in dict.fromkeys(asked) if all(lookup(metadata, property) is None for metadata in sample)
    ]
    if not unknown:
        return
    keys = dict.fromkeys(key for metadata in sample for key in _paths(metadata))
    for property in unknown[:WARNINGS_MAX]:
        of = f"None of the {len(sample):,} newest events that may match has the metadata key {property!r}"
        yield f"{of}{_meant(property, keys, 'Keys')}"


def _paths(metadata: dict[str, object]) -> Iterator[str]:
    for key, value in metadata.items():
        if isinstance(value, dict):
            yield from (path_of([key, inner]) for inner in value)
        else:
            yield path_of([key])


def _meant(wanted: str, known: Iterable[str], what: str) -> str:
    """The closest of what was seen, and some more of it."""
    known = list(known)
    close = difflib.get_close_matches(wanted, known, n=1)
    did = f"; did you mean {close[0]!r}?" if close else "."
    more = f" and {len(known) - SHOWN_MAX:,} more" if len(known) > SHOWN_MAX else ""
    return f"{did} {what} seen: {', '.join(map(repr, known[:SHOWN_MAX]))}{more}." if known else did


def _about_values(aggregation: Aggregation, found: Unmatched) -> str:
    assert found.example is not None
    what = "a text, number or boolean" if aggregation.func == "unique" else "a number"
    example = event_id(found.example.id_hi, found.example.id_lo)
    return (
        f"{found.no_number:,} matching events of {DAYS} add nothing, because {aggregation.property!r} is not {what}, "
        f"such as {found.example.value} in event {example}. Send the value as {what} of JSON."
    )
