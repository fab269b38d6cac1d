"""Bodies whose shape is a struct: what is wrong with one is said where it is wrong, in Polar's words for it."""

import re
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
from fastapi import Request

from aggregator.api.customers import refuse_organization
from aggregator.api.desk import body_of
from aggregator.api.errors import Malformed, Refused
from meters.detail import detail

T = TypeVar("T")
_PLACE = re.compile(r"^(?P<reason>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_NAME = re.compile(r"`(\w+)`")
_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")


async def body_as(kind: type[T], request: Request, *, otherwise: Any = None) -> T:
    """The request's JSON as a struct; fields that it does not know are passed over. Raises Malformed, Refused."""
    return shaped(kind, await body_of(request, otherwise=otherwise))


def shaped(kind: type[T], body: Any) -> T:
    """A decoded body as a struct. Raises Malformed; Refused where it names an organization."""
    if not isinstance(body, dict):
        message = "Input should be a valid dictionary or object"
        raise Malformed([detail("model_attributes_type", ("body",), message, body)])
    refuse_organization(body)
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise _complaint(str(error), body) from error


def moment(given: datetime | None, now: datetime, *, too_late: str) -> datetime:
    """The body's ``at`` in UTC, or now: one instant is decided once, in whatever offset it is given.

    Raises Malformed; Refused with the words of ``too_late`` where the time is still to come.
    """
    if given is not None and given.tzinfo is None:
        message = "Input should have timezone info"
        raise Malformed([detail("timezone_aware", ("body", "at"), message, given.isoformat())])
    if given is not None and given > now:
        raise Refused("value_error", ("body", "at"), too_late, given)
    try:
        return (given or now).astimezone(UTC)
    except OverflowError as error:
        message = "Input should be a time that the calendar has in UTC"
        raise Malformed([detail("value_error", ("body", "at"), message, str(given))]) from error


def _complaint(text: str, body: Any) -> Malformed:
    found = _PLACE.match(text)
    reason, path = (found["reason"], found["path"] or "") if found else (text, "")
    loc: list[str | int] = [int(place) if place.isdigit() else name or place for name, place in _STEP.findall(path)]
    if reason.startswith("Object missing required field") and (name := _NAME.search(reason)):
        return Malformed([detail("missing", ("body", *loc, name[1]), "Field required", _at(body, loc))])
    kind = "uuid_parsing" if reason == "Invalid UUID" else "value_error"
    return Malformed([detail(kind, ("body", *loc), reason, _at(body, loc))])


def _at(value: Any, loc: list[str | int]) -> Any:
    """What stands at a place of the body."""
    for step in loc:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value
