"""Which customer meters there are, and in which order, where there are too many to look at each.

A list of a million rows shows ten. So the rows are found and put in order as arrays, one for each meter, and only those
of the page are read. This works in a thread, waits its turn and ends in time like a question to the store; but it reads
memory alone, unless a list is put in order by amounts that memory does not keep. Amounts are put in order as doubles,
as Polar does; the rows show every digit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aggregator.service.balances import Pair, from_memory
from aggregator.service.service import Desk, Here, Order, Page, Patience
from aggregator.store.queries import usage
from aggregator.store.queries.scope import Scope
from aggregator.store.queries.usage import Question, Windows
from aggregator.view import EVER, Unavailable
from meters.aggregation import is_summable
from meters.catalogue import Customer
from meters.meter import Meter
from meters.timestamp import microseconds_of

Integers = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
NOBODY = -1  # the last place of an array, where nothing is


class _Rows(NamedTuple):
    """A column each: places of customers and of meters, the last change in us, what was credited and consumed."""

    customer: Integers
    meter: Integers
    modified: Integers
    credited: Doubles
    consumed: Doubles


class _Where(NamedTuple):
    """Where is looked, and for how long."""

    desk: Desk
    patience: Patience
    here: Here | None


class NotInMemory(Exception):
    """The list is put in order by amounts that the store has to be asked for."""


def find_page(
    desk: Desk, customers: Sequence[Customer], meters: Sequence[Meter], order: Order, page: Page, patience: Patience,
    here: Here | None = None,
) -> tuple[list[Pair], int]:  # fmt: skip
    """The pairs of one page of the list, and how many rows it has. ``here`` is where the store can be asked.

    Raises TooLong, Unavailable while a meter is counted, NotInMemory where the store has to be asked and cannot.
    """
    rows = _rows(_Where(desk, patience, here), customers, meters, order.by)
    keys = _keys(customers, meters, rows, order.by)
    places = np.lexsort((rows.meter, rows.customer, keys))
    places = places if order.ascending else places[::-1]
    chosen = places[page.offset : page.offset + page.limit]
    pairs = [(customers[rows.customer[place]], meters[rows.meter[place]]) for place in chosen]
    return pairs, len(places)


def _rows(where: _Where, customers: Sequence[Customer], meters: Sequence[Meter], by: str) -> _Rows:
    view, each = where.desk.view, where.patience.each
    numbers = [view.directory.find(c.organization_id, c.external_id, c.id) for c in each(customers)]
    first = np.array([found[0] if found else NOBODY for found in numbers], np.int64)
    second = np.array([found[1] if len(found) > 1 else NOBODY for found in numbers], np.int64)
    places = {customer.id: place for place, customer in enumerate(customers)}
    parts = []
    for place, meter in enumerate(each(meters)):
        arrived = view.totals.arrivals(meter.id)
        if arrived is None:
            raise Unavailable("meters are still being counted")
        newest, known = np.append(arrived, EVER), [np.where(n < len(arrived), n, NOBODY) for n in (first, second)]
        modified = np.maximum(newest[known[0]], newest[known[1]])
        is_there, credited = modified != EVER, np.zeros(len(customers))
        for customer_id, account in each(list(view.ledger.of_meter(meter.id).items())):  # the writer goes on meanwhile
            if (at := places.get(customer_id)) is not None:
                is_there[at] = True
                modified[at] = max(int(modified[at]), microseconds_of(account.moved_at))
                credited[at] = account.credited
        found = np.flatnonzero(is_there)
        consumed = credited
        if by in ("consumed_units", "balance"):
            consumed = _consumed(where, meter, customers, found, known)
        parts.append(_Rows(found, np.full(len(found), place), modified[found], credited[found], consumed[found]))
    whole, amounts = np.zeros(0, np.int64), np.zeros(0)
    nothing = _Rows(whole, whole, whole, amounts, amounts)
    columns: list[Any] = [np.concatenate(column) for column in zip(nothing, *parts, strict=True)]
    return _Rows(*columns)


def _consumed(
    where: _Where, meter: Meter, customers: Sequence[Customer], found: Integers, known: list[Integers]
) -> Doubles:
    """What each customer used, where ``found`` says that there is a row."""
    amounts = where.desk.view.totals.amounts(meter.id)
    consumed, apart = np.zeros(len(customers)), found
    if amounts is not None:
        amounts = np.append(amounts, 0.0)
        consumed = sum((amounts[np.minimum(numbers, len(amounts) - 1)] for numbers in known), start=consumed)
        has_both = (known[0][found] != NOBODY) & (known[1][found] != NOBODY)
        apart = found[:0] if is_summable(meter.aggregation) else found[has_both]  # used under two names
    for place in where.patience.each(apart.tolist()):
        consumption = from_memory(where.desk, customers[place], meter)
        if consumption is None:
            return _recounted(where, meter, customers, found, known)
        consumed[place] = consumption.value
    return consumed


def _recounted(
    where: _Where, meter: Meter, customers: Sequence[Customer], found: Integers, known: list[Integers]
) -> Doubles:
    """The same from the store, in one question."""
    desk, patience, here = where
    if here is None:
        raise NotInMemory
    since = np.zeros(len(customers), np.int64)  # nothing arrived before 1970
    for place in patience.each(found.tolist()):
        account = desk.view.ledger.account(customers[place].id, meter.id)
        since[place] = microseconds_of(account.since) if account and account.since else 0
    named = [(numbers[found], found) for numbers in known]
    subjects, places = (np.concatenate(columns) for columns in zip(*named, strict=True))
    is_named = subjects != NOBODY
    windows = Windows(subjects[is_named], places[is_named], since[places[is_named]])
    asked = Question(filter=meter.filter, aggregation=meter.aggregation, scope=Scope(organization=here.organization))
    consumed = np.zeros(len(customers))
    for place, measured in patience.each(usage.in_windows(here.connection, asked, windows)):
        consumed[place] = measured.value(meter.aggregation)
    return consumed


def _keys(customers: Sequence[Customer], meters: Sequence[Meter], rows: _Rows, by: str) -> Integers | Doubles:
    """Numbers in the order that is asked for."""
    match by:
        case "modified_at":
            return rows.modified
        case "consumed_units":
            return rows.consumed
        case "credited_units":
            return rows.credited
        case "balance":
            return rows.credited - rows.consumed
        case "created_at":
            times = [np.array([microseconds_of(one.created_at) for one in kind], np.int64)
                     for kind in (customers, meters)]  # fmt: skip
            return np.maximum(times[0][rows.customer], times[1][rows.meter])
        case "customer_id" | "customer_name":
            return _ranks(customers, lambda one: (one.name or "") if by == "customer_name" else one.id)[rows.customer]
    return _ranks(meters, lambda one: one.name if by == "meter_name" else one.id)[rows.meter]


def _ranks(things: Sequence[Any], key: Callable[[Any], Any]) -> Integers:
    """The place of each thing's key among all keys; equal keys share one."""
    keys = [key(thing) for thing in things]
    ranks = {value: rank for rank, value in enumerate(sorted(set(keys)))}
    return np.array([ranks[value] for value in keys], np.int64)
