"""Which customer meters there are, and in which order, where there are too many to look at each.

A list of a million rows shows ten. So the rows are found and put in order as arrays, one for each meter, and only those
of the page are read. This works in a thread and reads memory alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aggregator.api.balances import CustomerMeter, Pair, from_memory
from aggregator.api.desk import Desk
from aggregator.api.paging import Order, Page
from aggregator.view import EVER, Unavailable
from meters.catalogue import Customer
from meters.facts import EPOCH, MICROSECOND
from meters.meter import Meter

Integers = npt.NDArray[np.int64]
NOBODY = -1  # the last place of an array, where nothing is


class _Rows(NamedTuple):
    """Places of customers and of meters, and when each of their customer meters changed last, in us."""

    customer: Integers
    meter: Integers
    modified: Integers


def find_page(
    desk: Desk, customers: Sequence[Customer], meters: Sequence[Meter], order: Order, page: Page
) -> tuple[list[Pair], int]:
    """The pairs of one page of the list, and how many rows it has. Raises Unavailable while a meter is counted."""
    rows = _rows(desk, customers, meters)
    keys = _keys(desk, customers, meters, rows, order.by)
    places = np.lexsort((rows.meter, rows.customer, keys))
    places = places if order.ascending else places[::-1]
    chosen = places[page.offset : page.offset + page.limit]
    pairs = [(customers[rows.customer[place]], meters[rows.meter[place]]) for place in chosen]
    return pairs, len(places)


def _rows(desk: Desk, customers: Sequence[Customer], meters: Sequence[Meter]) -> _Rows:
    numbers = [desk.view.numbers(c.organization_id, c.external_id, c.id) for c in customers]
    first = np.array([found[0] if found else NOBODY for found in numbers], np.int64)
    second = np.array([found[1] if len(found) > 1 else NOBODY for found in numbers], np.int64)
    places = {customer.id: place for place, customer in enumerate(customers)}
    parts = []
    for place, meter in enumerate(meters):
        arrived = desk.view.arrivals(meter.id)
        if arrived is None:
            raise Unavailable("meters are still being counted")
        newest = np.append(arrived, EVER)
        modified = np.maximum(*(newest[np.where(known < len(arrived), known, NOBODY)] for known in (first, second)))
        is_there = modified != EVER
        for customer_id, account in list(desk.view.ledger.of_meter(meter.id).items()):  # the writer goes on meanwhile
            if (at := places.get(customer_id)) is not None:
                is_there[at] = True
                modified[at] = max(int(modified[at]), (account.moved_at - EPOCH) // MICROSECOND)
        found = np.flatnonzero(is_there)
        parts.append(_Rows(found, np.full(len(found), place), modified[found]))
    nothing = _Rows(*(np.zeros(0, np.int64) for _ in range(3)))
    return _Rows(*(np.concatenate(column) for column in zip(nothing, *parts, strict=True)))


def _keys(desk: Desk, customers: Sequence[Customer], meters: Sequence[Meter], rows: _Rows, by: str) -> Integers:
    """Integers in the order that is asked for."""
    match by:
        case "modified_at":
            return rows.modified
        case "created_at":
            times = [np.array([(one.created_at - EPOCH) // MICROSECOND for one in kind], np.int64)
                     for kind in (customers, meters)]  # fmt: skip
            return np.maximum(times[0][rows.customer], times[1][rows.meter])
        case "customer_id" | "customer_name":
            return _ranks(customers, lambda one: (one.name or "") if by == "customer_name" else one.id)[rows.customer]
        case "meter_id" | "meter_name":
            return _ranks(meters, lambda one: one.name if by == "meter_name" else one.id)[rows.meter]
    pairs = [(customers[who], meters[which]) for who, which in zip(rows.customer, rows.meter, strict=True)]
    return _ranks([_read(desk, *pair) for pair in pairs], lambda one: getattr(one, by.removesuffix("_units")))


def _read(desk: Desk, customer: Customer, meter: Meter) -> CustomerMeter:
    consumption = from_memory(desk, customer, meter)
    if consumption is None:
        raise Unavailable("meters are still being counted")
    return CustomerMeter(customer, meter, desk.view.ledger.account(customer.id, meter.id), consumption)


def _ranks(things: Sequence[Any], key: Callable[[Any], Any]) -> Integers:
    """The place of each thing's key among all keys; equal keys share one."""
    keys = [key(thing) for thing in things]
    ranks = {value: rank for rank, value in enumerate(sorted(set(keys)))}
    return np.array([ranks[value] for value in keys], np.int64)
