"""Routes of customer meters (section 5 of Polar's contract) and their ledgers.

A row exists for each customer and meter with usage, a credit or a reset. Rows come from memory and reflect the last
commit; Polar recomputes them seconds to hours later. The ledger routes list every movement of a balance, and the
events behind an entry. Data that memory does not keep comes from the store.
"""

import contextlib
from functools import partial
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Response

from aggregator.api.requests import (
    AtDesk,
    Ids,
    Texts,
    WhichPage,
    allow,
    answer,
    includes,
    listed,
    on_page,
    order,
    texts,
)
from aggregator.api.schemas import gives, page_of
from aggregator.service import answers
from aggregator.service.balances import CustomerMeter, customer_meters, find, numbers_of
from aggregator.service.customer_meter_sort import NotInMemory, find_page, sort_customer_meters
from aggregator.service.errors import NotFound
from aggregator.service.serializers import customer_meter_shape, entry_shape, event_shape
from aggregator.service.service import Desk, Here, Order, Page
from aggregator.store.queries import events, usage
from aggregator.store.queries.events import Identity, Listing
from aggregator.store.queries.scope import NOBODY, Scope
from aggregator.view import Unavailable
from meters.catalogue.catalogue import Customer, Token
from meters.ledger.ledger import Account
from meters.ledger.statement import Entry, parse_usage_id, statement
from meters.meter import Meter

router = APIRouter(tags=["customer meters"])
READING = frozenset({"customer_meters:read"})
Reader = Annotated[Token, Depends(allow(READING))]
SORTINGS = (
    "created_at", "modified_at", "customer_id", "customer_name", "meter_id", "meter_name", "consumed_units",
    "credited_units", "balance",
)  # fmt: skip
DEFAULT_SORTING = "-modified_at"
PAIRS_AT_ONCE = 2_000
"""Pairs of customers and meters that are looked at one by one, in about 20 ms; of more only those of the page are."""


@router.get("/v1/customer-meters/", responses=gives(page_of(answers.CustomerMeter)))
async def list_customer_meters(
    desk: AtDesk, token: Reader, page: WhichPage, organization_id: Ids = None, customer_id: Ids = None,
    external_customer_id: Texts = None, meter_id: Ids = None, sorting: Texts = None,
) -> Response:  # fmt: skip
    """What customers used, were credited and have left, latest change first. Archived meters only when asked for."""
    chosen = order(sorting, SORTINGS, DEFAULT_SORTING)
    as_of = desk.view.as_of
    customers = _customers(desk, token, texts(customer_id), external_customer_id)
    if not includes(organization_id, token):
        customers = []
    meters = _meters(desk, token, texts(meter_id))
    if len(customers) * len(meters) <= PAIRS_AT_ONCE:
        with contextlib.suppress(Unavailable):  # memory may not have more of them than can be counted one by one
            found = await customer_meters(desk, [(customer, meter) for customer in customers for meter in meters])
            return answer(in_order(found, chosen, page), as_of)
    listing = partial(find_page, desk, customers, meters, chosen, page)
    try:
        pairs, total = await desk.look(token, listing)
    except NotInMemory:
        (pairs, total), _ = await desk.ask(token, lambda here: listing(here.patience, here))
    shown = await customer_meters(desk, pairs)
    return answer(listed([customer_meter_shape(one) for one in shown], total, page), as_of)


def in_order(found: list[CustomerMeter], chosen: Order, page: Page) -> answers.ListResource[answers.CustomerMeter]:
    """The page of a list of customer meters."""
    rows = on_page(sort_customer_meters(found, chosen), page)
    return listed([customer_meter_shape(one) for one in rows], len(found), page)


def _meters(desk: Desk, token: Token, ids: list[str] | None) -> list[Meter]:
    known = desk.catalogue.meters_of(token.organization_id)
    return [meter for meter in known if (meter.archived_at is None if ids is None else meter.id in ids)]


def _customers(desk: Desk, token: Token, ids: list[str] | None, externals: list[str] | None) -> list[Customer]:
    """The organization's customers who are asked for, by either name."""
    known, organization = desk.catalogue, token.organization_id
    if ids is None and externals is None:
        return known.customers_of(organization)
    named = [known.customer(organization, id) for id in dict.fromkeys(ids or ())]
    named += [known.customer_by_external_id(organization, name) for name in dict.fromkeys(externals or ())]
    return list({found.id: found for found in named if found}.values())


@router.get("/v1/customer-meters/{id}", responses=gives(answers.CustomerMeter))
async def get_customer_meter(desk: AtDesk, token: Reader, id: UUID) -> Response:
    """One customer's meter."""
    as_of = desk.view.as_of
    return answer(customer_meter_shape(await _found(desk, token, id)), as_of)


async def _found(desk: Desk, token: Token, id: UUID) -> CustomerMeter:
    pair = find(desk, token.organization_id, str(id))
    found = await customer_meters(desk, [pair]) if pair else []
    if not found:
        raise NotFound
    return found[0]


@router.get("/v1/customer-meters/{id}/ledger", responses=gives(page_of(answers.LedgerEntry)))
async def list_ledger(desk: AtDesk, token: Reader, id: UUID, page: WhichPage) -> Response:
    """Every movement of the balance, newest first, with what was left after it. They add up to the balance."""
    one = await _found(desk, token, id)
    account = one.account or Account()
    scope = Scope(organization=NOBODY, subjects=partial(numbers_of, desk, one.customer))
    cuts = sorted({reset.at for reset in account.resets})

    def question(here: Here) -> list[Entry]:  # a year of usage is half a second of work, which nobody else waits for
        usages = usage.by_quarter(here.connection, one.meter, here.within(scope), cuts)
        return statement(one.meter.aggregation, account, usages)[::-1]

    entries, as_of = await desk.ask(token, question)
    return answer(listed([entry_shape(entry) for entry in on_page(entries, page)], len(entries), page), as_of)


@router.get("/v1/customer-meters/{id}/ledger/{entry_id}/events", responses=gives(page_of(answers.Event)))
async def list_events_behind(desk: AtDesk, token: Reader, id: UUID, entry_id: str, page: WhichPage) -> Response:
    """The events that an entry of usage is made of, newest first; also those that wait for their parents."""
    one = await _found(desk, token, id)
    stretch = parse_usage_id(entry_id)
    if stretch is None:
        raise NotFound
    listing = Listing(
        scope=Scope(
            organization=NOBODY, subjects=partial(numbers_of, desk, one.customer),
            arrived_since=stretch[0], arrived_until=stretch[1],
        ),
        filter=one.meter.filter, aggregation=one.meter.aggregation, limit=page.limit, offset=page.offset,
        shows_pending=True,
    )  # fmt: skip

    def question(here: Here) -> tuple[events.Page, dict[Identity, int]]:
        found = events.page(here.connection, here.about(listing))
        return found, events.descendant_counts(here.connection, [event.identity for event in found.events])

    (found, children), as_of = await desk.ask(token, question)
    shapes = [
        event_shape(event, token.organization_id, desk.catalogue, children[event.identity], {})
        for event in found.events
    ]
    return answer(listed(shapes, found.total, Page(page.limit, page.offset)), as_of)
