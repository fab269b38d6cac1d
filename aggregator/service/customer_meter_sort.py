"""Sort customer meters, and find one page of a list that is too long to read row by row.

``sort_customer_meters`` sorts a short list by ``sort_key``. ``find_page`` handles long lists: of a million rows, a
page shows ten. It finds and sorts the rows as arrays, one array per meter, and only the page's rows are read in full.

``find_page`` runs in a thread under the limits of store queries, but reads memory alone, unless the list is sorted by
amounts that memory does not keep. Amounts in arrays are doubles, which is Polar's precision; the rows show all
digits. Equal rows are ordered by customer, then by meter.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from aggregator.service.balances import CustomerMeter, Pair, from_memory, numbers_of
from aggregator.service.service import Desk, Here, Order, Page, Patience
from aggregator.store.queries import usage
from aggregator.store.queries.scope import Scope
from aggregator.store.queries.usage import Question, Windows
from aggregator.view import EVER, Unavailable
from meters.aggregation import is_summable
from meters.catalogue.catalogue import Customer
from meters.meter import Meter
from meters.timestamps import microseconds_of

Integers = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
NOBODY = -1  # the last place of an array, where nothing is
Amount = TypeVar("Amount", covariant=True)


class _Rows(NamedTuple):
    """A column each: places of customers and of meters, the last change in us, what was credited and consumed."""

    customer: Integers
    meter: Integers
    modified: Integers
    credited: Doubles
    consumed: Doubles

    @property
    def balance(self) -> Doubles:
        """What is left of the credits."""
        return self.credited - self.consumed


class _HasAmounts(Protocol[Amount]):
    """One customer meter, or a column for each amount of many."""

    @property
    def consumed(self) -> Amount: ...

    @property
    def credited(self) -> Amount: ...

    @property
    def balance(self) -> Amount: ...


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
    named = [numbers_of(where.desk, customer) for customer in each(customers)]
    most = max(map(len, named), default=0) or 1  # one or two, and more where customers were joined
    numbers = np.array([(*found, *(NOBODY,) * (most - len(found))) for found in named], np.int64).reshape(-1, most).T
    places = {customer.id: place for place, customer in enumerate(customers)}
    parts = []
    for place, meter in enumerate(each(meters)):
        arrived = view.totals.arrivals(meter)
        if arrived is None:
            raise Unavailable("meters are still being counted")
        newest, known = np.append(arrived, EVER), np.where(numbers < len(arrived), numbers, NOBODY)
        modified = newest[known].max(axis=0)
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
    columns = zip(nothing, *parts, strict=True)
    return _Rows(*map(np.concatenate, columns))


def _consumed(
    where: _Where, meter: Meter, customers: Sequence[Customer], found: Integers, known: Integers
) -> Doubles:
    """What each customer used, where ``found`` says that there is a row."""
    amounts = where.desk.view.totals.amounts(meter)
    consumed, apart = np.zeros(len(customers)), found
    if amounts is not None:
        amounts = np.append(amounts, 0.0)
        consumed = sum((amounts[np.minimum(numbers, len(amounts) - 1)] for numbers in known), start=consumed)
        has_several = (known[:, found] != NOBODY).sum(axis=0) > 1
        apart = found[:0] if is_summable(meter.aggregation) else found[has_several]  # used under several names
    for place in where.patience.each(apart.tolist()):
        consumption = from_memory(where.desk, customers[place], meter)
        if consumption is None:
            return _recounted(where, meter, customers, found, known)
        consumed[place] = consumption.value
    return consumed


def _recounted(
    where: _Where, meter: Meter, customers: Sequence[Customer], found: Integers, known: Integers
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


def sort_customer_meters(found: Iterable[CustomerMeter], order: Order) -> list[CustomerMeter]:
    """Sort customer meters that were read one by one. Equal rows keep their order; descending reverses all rows."""
    rows = sorted(found, key=lambda one: sort_key(one, order.by))
    return rows if order.ascending else rows[::-1]


def sort_key(one: CustomerMeter, by: str) -> str | datetime | Decimal:
    """Return the value by which a customer meter is sorted. ``_keys`` has the same values for many rows at once."""
    match by:
        case "created_at":
            return one.created_at
        case "modified_at":
            return one.modified_at or one.created_at
    if by in _CUSTOMER_TEXTS:
        return _CUSTOMER_TEXTS[by](one.customer)
    if by in _METER_TEXTS:
        return _METER_TEXTS[by](one.meter)
    return _amount(one, by)


def _keys(customers: Sequence[Customer], meters: Sequence[Meter], rows: _Rows, by: str) -> Integers | Doubles:
    """Return a number for each row whose order is that of ``sort_key``, with amounts as doubles."""
    match by:
        case "created_at":
            return _created(customers, meters, rows)
        case "modified_at":
            return np.maximum(rows.modified, _created(customers, meters, rows))
    if by in _CUSTOMER_TEXTS:
        return _ranks(map(_CUSTOMER_TEXTS[by], customers))[rows.customer]
    if by in _METER_TEXTS:
        return _ranks(map(_METER_TEXTS[by], meters))[rows.meter]
    return _amount(rows, by)


def _created(customers: Sequence[Customer], meters: Sequence[Meter], rows: _Rows) -> Integers:
    kinds: tuple[Sequence[Customer | Meter], ...] = customers, meters
    times = [np.array([microseconds_of(one.created_at) for one in kind], np.int64) for kind in kinds]
    return np.maximum(times[0][rows.customer], times[1][rows.meter])


_CUSTOMER_TEXTS: dict[str, Callable[[Customer], str]] = {
    "customer_id": lambda customer: customer.id,
    "customer_name": lambda customer: customer.name or "",
}
_METER_TEXTS: dict[str, Callable[[Meter], str]] = {
    "meter_id": lambda meter: meter.id,
    "meter_name": lambda meter: meter.name,
}


def _amount(of: _HasAmounts[Amount], by: str) -> Amount:
    match by:
        case "consumed_units":
            return of.consumed
        case "credited_units":
            return of.credited
    assert by == "balance"
    return of.balance


def _ranks(texts: Iterable[str]) -> Integers:
    """Return the place of each text among all texts; equal texts share one place."""
    keys = list(texts)
    ranks = {value: rank for rank, value in enumerate(sorted(set(keys)))}
    return np.array([ranks[value] for value in keys], np.int64)
