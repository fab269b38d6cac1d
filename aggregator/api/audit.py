"""Audit routes for reconciliation: fingerprints of the store's rows, and the totals that are kept in memory.

``meterstream reconcile`` reads a running server through these routes; they are not part of the public document. The
answers span all organizations, so a token needs the scope ``audit:read``, which no token has by default. Questions
come from a closed list (``aggregator.store.queries.audit``), and none changes anything. Only one question is answered
at a time, so an audit does not slow down customers' queries.
"""

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import islice, takewhile
from typing import Annotated, NamedTuple, TypeVar

import msgspec
import pyarrow as pa
from fastapi import APIRouter, Depends, Request, Response

from aggregator.api.requests import AtDesk, allow, bytes_of
from aggregator.service.balances import numbers_of
from aggregator.service.errors import NotFound
from aggregator.service.service import Desk
from aggregator.store.meter_sql import Measured
from aggregator.store.queries import audit, usage
from aggregator.store.queries.audit import BLOCK, QUESTIONS, Part, Which, put
from aggregator.store.queries.scope import Scope, organization_number
from aggregator.store.queries.usage import Question
from aggregator.view import Snapshot, Total
from meters.catalogue.access import AUDIT
from meters.catalogue.catalogue import Token
from meters.log import format_position
from meters.meter import Meter

T = TypeVar("T")
Kept = TypeVar("Kept")
ARROW = "application/vnd.apache.arrow.stream"
BODY_BYTES_MAX = 64 * 1024 * 1024  # identities that are asked about: half a million take 8 MB
ATTEMPTS_MAX = 20  # while events flow, two answers for one position need some luck
PUBLISHED_S_MAX = 1.0  # from the commit of a round on; then there is a while until the next one
RECOUNTED_MAX = 200  # accounts of a meter whose usage is counted again: a query each
RECOUNTING_S_MAX = 20.0  # no account is begun after it: whoever asks waits a minute
HOUR = timedelta(hours=1)

router = APIRouter(prefix="/v1/audit", include_in_schema=False)
NUMBERS = {
    "parameters": [
        {"name": name, "in": "query"} for name in sorted(set(re.findall(r"\$(\w+)", " ".join(QUESTIONS.values()))))
    ]
}
"""The parameters of questions, which are numbers."""
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


class _Window(NamedTuple):
    """What memory says that a customer used since the reset."""

    customer_id: str
    subjects: list[int]
    since: datetime
    consumed: Decimal


@router.post("/ask/{question}", openapi_extra=NUMBERS)
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
    return _json(desk.view.totals.total(meter, asked.subjects))


@router.post("/blocks")
async def blocks(request: Request, desk: AtDesk, token: Auditor) -> Response:
    """A meter's totals by blocks of customers and by hours, and the recount up to the position they are true for.

    Null while events flow too fast to read all blocks between two rounds.
    """
    asked, meter = await _asked(request, desk)
    ranges = [list(range(block * BLOCK, (block + 1) * BLOCK)) for block in range(asked.blocks)]
    spans = [(hour, hour + HOUR) for hour in asked.hours]

    def totals() -> tuple[list[Total | None], list[Total] | None]:
        return [desk.view.totals.total(meter, one) for one in ranges], desk.view.totals.by_quarters(meter, spans)

    def parts(here: Snapshot) -> list[Part]:
        return list(audit.everything(here.connection, [meter], _number(here, meter), here.as_of))

    found = await _beside(desk, totals, lambda kept, here: (*kept, parts(here)))
    return _json(dict(zip(("blocks", "hours", "parts"), found, strict=True)) if found else None)


@router.post("/by-customer")
async def by_customer(request: Request, desk: AtDesk, token: Auditor) -> Response:
    """The customers of a block."""
    asked, meter = await _asked(request, desk)
    found, _ = await _read(
        desk, lambda here: audit.by_customer(here.connection, meter, _number(here, meter), asked.block)
    )
    return _json(found)


@router.post("/by-hour")
async def by_hour(request: Request, desk: AtDesk, token: Auditor) -> Response:
    """The hours of a customer."""
    asked, meter = await _asked(request, desk)
    found, _ = await _read(
        desk, lambda here: audit.by_hour(here.connection, meter, _number(here, meter), asked.subjects[0])
    )
    return _json(found)


@router.post("/moment")
async def moment(request: Request, desk: AtDesk, token: Auditor) -> Response:
    """Running total and recount of one customer or hour, true for one position; null while events flow too fast."""
    asked, meter = await _asked(request, desk)
    which = asked.which or Which()

    def question(running: Total | None, here: Snapshot) -> tuple[Total, Measured] | None:
        if running is None:
            return None
        return running, audit.part(here.connection, meter, _number(here, meter), which)

    return _json(await _beside(desk, lambda: _running(desk, meter, which), question))


@router.post("/balances")
async def balances(request: Request, desk: AtDesk, token: Auditor) -> Response:
    """Every account of a meter: credits, and for the first of them usage since the reset beside its recount."""
    _, meter = await _asked(request, desk)
    used = await _beside(
        desk, lambda: list(islice(_windows(desk, meter), RECOUNTED_MAX)),
        lambda windows, here: dict(_recounted(meter, windows, here)),
    ) or {}  # fmt: skip

    def rows() -> list[dict[str, object]]:
        accounts = list(desk.view.ledger.of_meter(meter.id).items())
        return [{"customer_id": id, "credited": account.credited, **used.get(id, {})} for id, account in accounts]

    return _json(await _in_turn(rows))


def _windows(desk: Desk, meter: Meter) -> Iterator[_Window]:
    for customer_id, account in list(desk.view.ledger.of_meter(meter.id).items()):
        customer = desk.catalogue.customer(meter.organization_id, customer_id)
        if customer is not None and account.since is not None:
            subjects = numbers_of(desk, customer)
            consumption = desk.view.totals.consumed(meter, subjects, account.since)
            if consumption is not None:
                yield _Window(customer_id, subjects, account.since, consumption.value)


def _recounted(meter: Meter, windows: Iterable[_Window], here: Snapshot) -> Iterator[tuple[str, dict[str, Decimal]]]:
    organization, ends_s = _number(here, meter), time.monotonic() + RECOUNTING_S_MAX
    for window in takewhile(lambda _: time.monotonic() < ends_s, windows):
        scope = Scope(organization=organization, subjects=window.subjects, arrived_since=window.since)
        question = Question(filter=meter.filter, aggregation=meter.aggregation, scope=scope)
        recounted = usage.value_of(here.connection, question).value(meter.aggregation)
        yield window.customer_id, {"consumed": window.consumed, "recounted": recounted}


def _running(desk: Desk, meter: Meter, which: Which) -> Total | None:
    if which.hour is None:
        return desk.view.totals.total(meter, [which.subject or 0])
    found = desk.view.totals.by_quarters(meter, [(which.hour, which.hour + HOUR)])
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

    return await _in_turn(run)


async def _beside(
    desk: Desk, remember: Callable[[], Kept], question: Callable[[Kept, Snapshot], T | None]
) -> T | None:
    """A question about what memory has and a snapshot that has the same; None while events flow too fast.

    A round is committed, then moves memory, then is published. So memory has all that is published before it is read,
    and nothing that a snapshot taken afterwards does not have: where these are one position, it is memory's.
    """

    def look() -> tuple[Mapping[int, int], T | None]:
        published = desk.view.as_of
        kept = remember()
        with desk.view.read() as here:
            return here.as_of, question(kept, here) if here.as_of == published else None

    for _ in range(ATTEMPTS_MAX):
        committed, found = await _in_turn(look)
        if found is not None:
            return found
        await desk.view.wait_for(committed, PUBLISHED_S_MAX)
    return None


async def _in_turn(work: Callable[[], T]) -> T:
    async with _one_at_a_time:
        return await asyncio.to_thread(work)


def _number(here: Snapshot, meter: Meter) -> int:
    return organization_number(here.connection, meter.organization_id)


def _json(found: object) -> Response:
    return Response(msgspec.json.encode(found), media_type="application/json")
