"""For reconciliation: the store's rows as fingerprints, and what is kept in memory beside them.

A token needs a scope that none has by default, because what is answered here knows no tenants. Questions come from a
closed list; nothing can be changed. One question at a time is answered: a proof may take its time, a customer may not.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, TypeVar

import msgspec
import pyarrow as pa
from fastapi import APIRouter, Depends, Request, Response

from aggregator.api.balances import from_memory, numbers_of
from aggregator.api.desk import AtDesk, Desk, allow, bytes_of
from aggregator.api.errors import NotFound
from aggregator.store.queries import recount, usage
from aggregator.store.queries.audit import QUESTIONS, put
from aggregator.store.queries.recount import BLOCK, Part, Which
from aggregator.store.queries.scope import Scope, organization_number
from aggregator.store.queries.usage import Question
from aggregator.store.sql import Measured
from aggregator.view import Snapshot, Total
from meters.access import AUDIT
from meters.catalogue import Token
from meters.log import format_position
from meters.meter import Meter

T = TypeVar("T")
ARROW = "application/vnd.apache.arrow.stream"
BODY_BYTES_MAX = 64 * 1024 * 1024  # identities that are asked about: half a million take 8 MB
ATTEMPTS_MAX = 20  # while events flow, two answers for one position need some luck
RECOUNTED_MAX = 200  # accounts of a meter whose usage is counted again: a query each
HOUR = timedelta(hours=1)

router = APIRouter(prefix="/v1/audit", include_in_schema=False)
Auditor = Annotated[Token, Depends(allow(frozenset({AUDIT})))]
_one_at_a_time = asyncio.Semaphore(1)


class Asked(msgspec.Struct):
    """A question about a meter: some customers' numbers, hours, or one of either."""

    meter_id: str
    block: int = 0
    blocks: int = 0
    subjects: list[int] = []
    hours: list[datetime] = []
    which: Which | None = None


@router.post("/ask/{question}")
async def ask(request: Request, desk: AtDesk, token: Auditor, question: str) -> Response:
    """The answer to one of ``QUESTIONS``, as Arrow. Numbers come as parameters, a table as the body."""
    if question not in QUESTIONS:
        raise NotFound
    parameters = {name: int(value) for name, value in request.query_params.items()}
    body = await bytes_of(request, BODY_BYTES_MAX)
    asked = pa.ipc.open_stream(body).read_all() if body else None
    found, as_of = await _read(desk, lambda snapshot: put(snapshot.connection, question, asked, parameters))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, found.schema) as writer:
        writer.write_table(found)
    return Response(sink.getvalue().to_pybytes(), media_type=ARROW, headers={"As-Of": as_of})


@router.post("/total")
async def total(request: Request, desk: AtDesk, token: Auditor) -> Response:
    """The running total of some customers together, or null."""
    asked, meter = await _asked(request, desk)
    return _json(desk.view.totals.total(meter.id, asked.subjects))


@router.post("/blocks")
async def blocks(request: Request, desk: AtDesk, token: Auditor) -> Response:
    """A meter's totals by blocks of customers and by hours, and the recount up to the position they are true for.

    Null while events flow too fast to read all blocks between two rounds.
    """
    asked, meter = await _asked(request, desk)
    found = await asyncio.to_thread(_at_once, desk, meter, asked.blocks, asked.hours)
    if found is None:
        return _json(None)
    totals, kept, as_of = found  # the snapshot is taken after them, so it has everything that they have

    def question(here: Snapshot) -> list[Part]:
        return list(recount.everything(here.connection, [meter], _number(here, meter), as_of))

    parts, _ = await _read(desk, question)
    return _json({"blocks": totals, "hours": kept, "parts": parts})


def _at_once(
    desk: Desk, meter: Meter, blocks: int, hours: Sequence[datetime]
) -> tuple[list[Total | None], list[Total] | None, Mapping[int, int]] | None:
    """Totals read between two rounds."""
    ranges = [list(range(block * BLOCK, (block + 1) * BLOCK)) for block in range(blocks)]
    spans = [(hour, hour + HOUR) for hour in hours]
    for _ in range(ATTEMPTS_MAX):
        as_of = desk.view.as_of
        totals = [desk.view.totals.total(meter.id, subjects) for subjects in ranges]
        kept = desk.view.totals.by_quarters(meter.id, spans)
        if desk.view.as_of == as_of:
            return totals, kept, as_of
    return None


@router.post("/by-customer")
async def by_customer(request: Request, desk: AtDesk, token: Auditor) -> Response:
    """The customers of a block."""
    asked, meter = await _asked(request, desk)
    found, _ = await _read(
        desk, lambda here: recount.by_customer(here.connection, meter, _number(here, meter), asked.block)
    )
    return _json(found)


@router.post("/by-hour")
async def by_hour(request: Request, desk: AtDesk, token: Auditor) -> Response:
    """The hours of a customer."""
    asked, meter = await _asked(request, desk)
    found, _ = await _read(
        desk, lambda here: recount.by_hour(here.connection, meter, _number(here, meter), asked.subjects[0])
    )
    return _json(found)


@router.post("/moment")
async def moment(request: Request, desk: AtDesk, token: Auditor) -> Response:
    """Running total and recount of one customer or hour, true for one position; null while events flow too fast."""
    asked, meter = await _asked(request, desk)
    which = asked.which or Which()

    def question(here: Snapshot) -> tuple[Total, Measured] | None:
        before = desk.view.as_of
        running = _running(desk, meter, which)
        if running is None or not before == here.as_of == desk.view.as_of:
            return None
        return running, recount.part(here.connection, meter, _number(here, meter), which)

    for _ in range(ATTEMPTS_MAX):
        found, _ = await _read(desk, question)
        if found is not None:
            return _json(found)
    return _json(None)


@router.post("/balances")
async def balances(request: Request, desk: AtDesk, token: Auditor) -> Response:
    """Every account of a meter: credits, and for the first of them usage since the reset beside its recount."""
    _, meter = await _asked(request, desk)
    found, _ = await _read(desk, lambda here: list(_balances(desk, meter, here)))
    return _json(found)


def _balances(desk: Desk, meter: Meter, here: Snapshot) -> Iterator[dict[str, Any]]:
    left = RECOUNTED_MAX
    for customer_id, account in list(desk.view.ledger.of_meter(meter.id).items()):
        customer = desk.catalogue.customer(meter.organization_id, customer_id)
        row: dict[str, Any] = {"customer_id": customer_id, "credited": account.credited}
        consumption = from_memory(desk, customer, meter) if customer else None
        if customer and consumption and account.since and left and desk.view.as_of == here.as_of:
            left -= 1
            scope = Scope(
                organization=_number(here, meter), subjects=numbers_of(desk, customer), arrived_since=account.since
            )
            question = Question(filter=meter.filter, aggregation=meter.aggregation, scope=scope)
            counted = usage.value_of(here.connection, question).value(meter.aggregation)
            row |= {"consumed": consumption.value, "recounted": counted}
        yield row


def _running(desk: Desk, meter: Meter, which: Which) -> Total | None:
    if which.hour is None:
        return desk.view.totals.total(meter.id, [which.subject or 0])
    found = desk.view.totals.by_quarters(meter.id, [(which.hour, which.hour + HOUR)])
    return found[0] if found else None


async def _asked(request: Request, desk: Desk) -> tuple[Asked, Meter]:
    try:
        asked = msgspec.json.decode(await bytes_of(request, BODY_BYTES_MAX), type=Asked)
        return asked, desk.catalogue.meters[asked.meter_id]
    except (msgspec.MsgspecError, KeyError) as error:
        raise NotFound from error


async def _read(desk: Desk, question: Callable[[Snapshot], T]) -> tuple[T, str]:
    """In a thread, on a snapshot; the answer and the position it is true for."""

    def run() -> tuple[T, str]:
        with desk.view.read() as snapshot:
            return question(snapshot), format_position(snapshot.as_of)

    async with _one_at_a_time:
        return await asyncio.to_thread(run)


def _number(here: Snapshot, meter: Meter) -> int:
    return organization_number(here.connection, meter.organization_id)


def _json(found: Any) -> Response:
    return Response(msgspec.json.encode(found), media_type="application/json")
