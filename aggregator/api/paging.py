"""Lists: which page, in which order, and the envelope around the items."""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Annotated, NamedTuple, TypeVar
from uuid import UUID

from fastapi import Depends, Query, Request
from pydantic import AfterValidator, AwareDatetime

from aggregator.api.answers import ListResource, Pagination
from aggregator.api.errors import Malformed
from aggregator.api.limits import IDENTIFIERS_MAX, METADATA_KEYS_MAX, PAGE_ROWS_DEFAULT, PAGE_ROWS_MAX
from meters.catalogue import Token
from meters.detail import detail

T = TypeVar("T")


def _in_utc(instant: datetime) -> datetime:
    try:
        return instant.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("the calendar does not reach that far") from error


def _as_sent(instant: datetime) -> datetime:
    _in_utc(instant)
    return instant


Instant = Annotated[AwareDatetime, AfterValidator(_in_utc)]
"""A point in time with an offset, brought to UTC."""

Bound = Annotated[AwareDatetime, AfterValidator(_as_sent)]
"""Where a range of calendar days begins or ends: a point in time in the offset of whoever asks."""

Ids = Annotated[list[UUID] | None, Query(max_length=IDENTIFIERS_MAX)]
Texts = Annotated[list[str] | None, Query(max_length=IDENTIFIERS_MAX)]


class Page(NamedTuple):
    """Which part of a list."""

    limit: int
    offset: int


async def _page(page: Annotated[int, Query(ge=1)] = 1, limit: Annotated[int, Query(ge=1)] = PAGE_ROWS_DEFAULT) -> Page:
    rows = min(limit, PAGE_ROWS_MAX)
    return Page(rows, (page - 1) * rows)


WhichPage = Annotated[Page, Depends(_page)]


def listed(items: list[T], total: int, page: Page) -> ListResource[T]:
    """Polar's envelope of a list."""
    return ListResource(items, Pagination(total, -(-total // page.limit)))


def on_page(items: Sequence[T], page: Page) -> list[T]:
    """The page of a list that is in memory."""
    return list(items[page.offset : page.offset + page.limit])


class Order(NamedTuple):
    """By what, and whether from small to large."""

    by: str
    ascending: bool


def order(sorting: list[str] | None, known: Collection[str], default: str) -> Order:
    """The first criterion that is asked for; the rest have no say. Raises Malformed for an unknown one."""
    allowed = [f"{sign}{name}" for name in known for sign in ("", "-")]
    for criterion in sorting or ():
        if criterion not in allowed:
            names = ", ".join(f"'{name}'" for name in allowed)
            raise Malformed([detail("enum", ("query", "sorting"), f"Input should be {names}", criterion)])
    chosen = (sorting or [default])[0]
    return Order(chosen.lstrip("-"), not chosen.startswith("-"))


async def metadata_texts(request: Request) -> dict[str, list[str]]:
    """``metadata[key]=value`` parameters: the texts asked for by key. Raises Malformed for too many."""
    found: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata[") and name.endswith("]"):
            found.setdefault(name[len("metadata[") : -1], []).append(value)
    if sum(map(len, found.values())) > IDENTIFIERS_MAX:
        message = f"At most {IDENTIFIERS_MAX} values are taken"
        raise Malformed([detail("too_long", ("query", "metadata"), message)])
    if len(found) > METADATA_KEYS_MAX:
        message = f"At most {METADATA_KEYS_MAX} different keys are taken"
        raise Malformed([detail("too_long", ("query", "metadata"), message)])
    return found


MetadataTexts = Annotated[dict[str, list[str]], Depends(metadata_texts)]

BY_METADATA = {"parameters": [{
    "name": "metadata", "in": "query", "style": "deepObject", "explode": True,
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
    "description": "`metadata[key]=value`: what has this text at the key. Repeated for one key: any of the texts",
}]}  # fmt: skip
"""For the OpenAPI document, which cannot see by itself what ``metadata_texts`` reads."""


def includes(organization_id: list[UUID] | None, token: Token) -> bool:
    """Whether an ``organization_id`` parameter leaves the token's organization in: none does, or one that names it."""
    return organization_id is None or token.organization_id in map(str, organization_id)


def texts(ids: list[UUID] | None) -> list[str] | None:
    """UUIDs as the catalogue writes them."""
    return None if ids is None else [str(id) for id in ids]
