"""Check request bodies by their definitions in ``schemas.py``, and report each error with its location.

``body_as`` converts a request's JSON to a struct as a whole. ``fields_of`` checks each field by itself and collects
every error, in Polar's words. Naming an organization in a body is an error, because the token names it. ``moment``
reads the optional ``at`` of a body.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from msgspec import inspect

from aggregator.api.requests import body_of
from aggregator.api.strictness import unknown_fields
from aggregator.service.errors import Malformed, Refused
from meters.errors import Detail, detail

T = TypeVar("T", bound=msgspec.Struct)
Loc = tuple[str | int, ...]
_PLACE = re.compile(r"^(?P<reason>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_NAME = re.compile(r"`(\w+)`")
_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")


async def body_as(kind: type[T], request: Request, *, otherwise: Any = None) -> T:
    """The request's JSON as a struct. Raises Malformed, Refused."""
    return shaped(kind, await body_of(request, otherwise=otherwise))


def shaped(kind: type[T], body: Any) -> T:
    """A decoded body as a struct. Raises Malformed; Refused where it names an organization."""
    given = mapping_of(body)
    refuse_organization(given)
    known_fields(kind, given)
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise _complaint(str(error), given) from error


def fields_of(kind: type[T], body: object, complaints: Sequence[Detail] = ()) -> dict[str, Any]:
    """The fields that a decoded body gives, each checked by its definition, in Polar's words.

    Raises Malformed with every complaint, after those that are known already.
    """
    given = mapping_of(body)
    found: dict[str, Any] = {}
    defined = _defined(kind)
    missing = [field.name for field in defined if field.required and field.name not in given]
    wrong = [*complaints, *(detail("missing", ("body", name), "Field required", given) for name in missing)]
    for field in defined:
        if field.name in given:
            found[field.name], more = _checked(field.type, given[field.name], ("body", field.name))
            wrong += more
    wrong += _unknown(kind, given)
    if wrong:
        raise Malformed(wrong)
    return found


def known_fields(kind: type[T], body: object) -> object:
    """The decoded body, whose fields are checked elsewhere.

    Unknown fields are refused or counted, as its definition says. Raises Malformed.
    """
    if isinstance(body, dict) and (wrong := _unknown(kind, body)):
        raise Malformed(wrong)
    return body


def mapping_of(body: object) -> dict[str, Any]:
    """The decoded body, which has to be an object. Raises Malformed."""
    if isinstance(body, dict):
        return body
    raise Malformed([detail("model_attributes_type", ("body",), "Input should be a valid dictionary or object", body)])


def refuse_organization(body: dict[str, Any]) -> None:
    """A token has one organization; naming one beside it is an error even if it is the same (as with Polar)."""
    given = body.get("organization_id")
    if given is not None:
        message = "Setting organization_id is disallowed when using an organization token."
        raise Refused("organization_token", ("body", "organization_id"), message, given)


@cache
def _defined(kind: type[msgspec.Struct]) -> tuple[inspect.Field, ...]:
    definition = inspect.type_info(kind)
    assert isinstance(definition, inspect.StructType)
    return definition.fields


def _unknown(kind: type[msgspec.Struct], body: dict[str, Any], loc: Loc = ("body",)) -> list[Detail]:
    """A complaint for each field that a definition which refuses them, or a part of it, does not have."""
    is_refused = bool(kind.__struct_config__.forbid_unknown_fields)
    wrong = unknown_fields(kind.__name__, body, kind.__struct_fields__, is_refused=is_refused, loc=loc)
    for field in _defined(kind):
        part, given = _struct(field.type), body.get(field.name)
        if part is not None and isinstance(given, dict):
            wrong += _unknown(part, given, (*loc, field.name))
    return wrong


def _struct(kind: inspect.Type) -> type[msgspec.Struct] | None:
    """The definition of a field that is an object, or null; None for fields of other types.

    Filters and aggregations are read by ``meters``, and whoever made them for Polar may say more.
    """
    match kind:
        case inspect.UnionType(types=(first, *_)):
            return _struct(first)
        case inspect.StructType(cls=struct):
            return struct
        case _:
            return None


def _checked(kind: inspect.Type, value: Any, loc: Loc) -> tuple[Any, list[Detail]]:
    """A value as its definition takes it, and what is wrong with it.

    A definition may name a function for a rule of its own (``extra={"parse": ...}``): it gives the value or complaints.
    """
    match kind:
        case inspect.UnionType(types=(first, *_)):  # a type or null
            return (None, []) if value is None else _checked(first, value, loc)
        case inspect.Metadata(type=inner, extra=extra):
            value, wrong = _checked(inner, value, loc)
            parsed = value if wrong or extra is None else extra["parse"](value, loc)
            return (None, parsed) if extra and isinstance(parsed, list) else (parsed, wrong)
        case inspect.LiteralType(values=values) if value not in values:
            return None, [detail("enum", loc, f"Input should be {' or '.join(map(repr, values))}", value)]
        case inspect.BoolType() if not isinstance(value, bool):
            return None, [detail("bool_type", loc, "Input should be a valid boolean", value)]
        case inspect.StrType() if not isinstance(value, str):
            return None, [detail("string_type", loc, "Input should be a valid string", value)]
        case inspect.StrType(max_length=int(length)) if len(value) > length:
            return None, [detail("string_too_long", loc, f"String should have at most {length} characters", value)]
    return value, []


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
