"""The delivery log of webhooks, and telling something again. Kept for 30 days, in the store alone."""

import asyncio
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Response

from aggregator.api import route_answers
from aggregator.api.limits import IDENTIFIERS_MAX, SEARCH_LENGTH_MAX
from aggregator.api.requests import AtDesk, Ids, Instant, WhichPage, answer, listed, texts
from aggregator.api.schemas import gives, page_of
from aggregator.api.webhook_endpoints import Reader, Writer
from aggregator.service.errors import Conflict, NotFound
from aggregator.service.service import Desk, Here
from aggregator.store.queries.scope import aware, naive
from aggregator.webhooks import outbox
from meters.catalogue import Token
from meters.webhooks import EventType

router = APIRouter(tags=["webhooks"])
Types = Annotated[list[EventType] | None, Query(max_length=IDENTIFIERS_MAX)]


async def _sought(
    token: Reader, endpoint_id: Ids = None, start_timestamp: Instant | None = None,
    end_timestamp: Instant | None = None, succeeded: bool | None = None,
    query: Annotated[str | None, Query(max_length=SEARCH_LENGTH_MAX)] = None,
    http_code_class: Literal["2xx", "3xx", "4xx", "5xx"] | None = None, event_type: Types = None,
) -> outbox.Sought:  # fmt: skip
    """What the parameters ask for. Both timestamps are exclusive."""
    return outbox.Sought(
        organization_id=token.organization_id, endpoint_ids=texts(endpoint_id), types=event_type,
        after=_stored(start_timestamp), before=_stored(end_timestamp), succeeded=succeeded,
        code_class=int(http_code_class[0]) if http_code_class else None, text=query,
    )  # fmt: skip


def _stored(instant: datetime | None) -> datetime | None:
    return None if instant is None else naive(instant)


@router.get("/v1/webhooks/deliveries", responses=gives(page_of(route_answers.WebhookDelivery)))
async def list_webhook_deliveries(
    desk: AtDesk, token: Reader, page: WhichPage, sought: Annotated[outbox.Sought, Depends(_sought)]
) -> Response:
    """Every attempt to deliver a webhook, newest first, with what came of it and what was sent."""

    def question(here: Here) -> tuple[list[dict[str, Any]], int]:
        return outbox.deliveries(here.connection, sought, page.limit, page.offset)

    (rows, total), as_of = await desk.ask(token, question)
    return answer(listed([_shape(row) for row in rows], total, page), as_of)


def _shape(row: dict[str, Any]) -> route_answers.WebhookDelivery:
    """An attempt. What an endpoint answers is not kept, so ``response`` is there only where it did not answer.

    Nothing is ever skipped or archived: no message is made for an endpoint that is disabled, and whatever is listed can
    be sent again.
    """
    status = row["status_code"]
    return route_answers.WebhookDelivery(
        id=row["id"],
        created_at=aware(row["started_at"]),
        modified_at=None,
        succeeded=status is not None and 200 <= status < 300,
        http_code=status,
        response=row["outcome"] if status is None else None,
        outcome=row["outcome"],
        took_ms=row["took_ms"],
        attempt=row["number"],
        endpoint_id=row["endpoint_id"],
        webhook_event=route_answers.WebhookEvent(
            id=row["message_id"],
            created_at=aware(row["made_at"]),
            modified_at=aware(row["settled_at"]) if row["settled_at"] else None,
            type=row["type"],
            customer_id=row["customer_id"],
            status=row["status"],
            payload=row["body"],
        ),
    )


@router.post(
    "/v1/webhooks/events/{id}/redeliver",
    status_code=202,
    responses=gives(route_answers.WebhookRedelivery, status=202),
)
async def redeliver_webhook_event(desk: AtDesk, token: Writer, id: UUID) -> Response:
    """Tell it again, word for word under the same ``webhook-id``, to every enabled endpoint that it was for."""
    count = await asyncio.to_thread(_again, desk, token, str(id))
    return answer(route_answers.WebhookRedelivery(str(id), count), desk.view.as_of, 202)


def _again(desk: Desk, token: Token, id: str) -> int:
    endpoints = desk.catalogue.webhooks.endpoints_of(token.organization_id)
    enabled = [endpoint.id for endpoint in endpoints if endpoint.disabled_at is None]
    with desk.view.outbox() as connection:
        count = outbox.deliver_again(connection, token.organization_id, id, enabled, naive(desk.now()))
        if not count and not outbox.knows(connection, token.organization_id, id):
            raise NotFound
    if not count:
        raise Conflict("Every endpoint that it was for is deleted or disabled.", is_passing=False)
    return count
