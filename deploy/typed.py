"""What a person types for filters, times and names.

Filters are ``--where model=gpt-4 --where 'tokens>=100'``, all of which must hold.

    =  !=  >  >=  <  <=      compare            ~  !~      contains, does not contain

A value that reads as a number, true or false is one; quotes make it a text (``--where 'zip="00123"'``). Zeros in
front make it one, too; what is a number for people alone (``+5``, ``5.``) is neither.

Times are ISO 8601, in UTC (or another zone) where they do not say. A name may mean several things.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, tzinfo
from decimal import Decimal
from typing import Any

from deploy.giving_up import USAGE, GiveUp
from meters import exact_json
from meters.metadata import JSON_NUMBER

OPERATORS = {"=": "eq", "!=": "ne", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte", "~": "like", "!~": "not_like"}
CLAUSE = re.compile(r"\s*(?P<property>[^=!<>~]+?)\s*(?P<operator>!=|>=|<=|!~|=|>|<|~)\s*(?P<value>.*?)\s*", re.DOTALL)
LIKE_A_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
CONTAINS = ("~", "!~")  # look at a number as it is written, which JSON keeps of one without an exponent


def parse_clause(text: str) -> dict[str, Any]:
    """One clause in the API's form. Raises GiveUp."""
    found = CLAUSE.fullmatch(text)
    if not found:
        raise GiveUp(f"--where takes PROPERTY=VALUE (or one of {' '.join(OPERATORS)}), and not {text!r}", USAGE)
    return {
        "property": found["property"],
        "operator": OPERATORS[found["operator"]],
        "value": _value(found["value"], found["operator"]),
    }


def parse_filter(filter: str | None, where: list[str]) -> dict[str, Any]:
    """A filter from JSON, from clauses, or from neither, which matches everything. Raises GiveUp."""
    if not filter:
        return {"conjunction": "and", "clauses": [parse_clause(text) for text in where]}
    if where:
        raise GiveUp("--filter and --where exclude each other; put all of it into one", USAGE)
    try:
        parsed = exact_json.decode(filter)
    except ValueError as error:
        raise GiveUp(f"--filter is no JSON: {error}", USAGE) from None
    if not isinstance(parsed, dict):
        raise GiveUp('--filter takes an object such as {"conjunction": "and", "clauses": []}', USAGE)
    return parsed


def parse_instant(text: str, option: str, zone: tzinfo = UTC) -> datetime:
    """The instant that was given for an option; ``zone`` is for one that does not say. Raises GiveUp."""
    try:
        given = datetime.fromisoformat(text)
        instant = given if given.tzinfo else given.replace(tzinfo=zone)
        instant.astimezone(UTC)  # the first and the last hours of all have no time in UTC
    except (ValueError, OverflowError):
        raise GiveUp(f"{option} takes a time such as 2026-03-01T00:00:00Z, and not {text!r}", USAGE) from None
    return instant


def meters_called(meters: Sequence[dict[str, Any]], wanted: str) -> list[dict[str, Any]]:
    """The meters of this id or name; archived ones only where there is no other."""
    found = [meter for meter in meters if wanted in (meter["id"], meter["name"])]
    return [meter for meter in found if not meter.get("archived_at")] or found


def ids(things: Sequence[dict[str, Any]]) -> str:
    """The ids of things of one name, to choose from."""
    return ", ".join(str(one["id"]) for one in things)


def _value(text: str, operator: str) -> str | bool | int | Decimal:
    if text in ("true", "false"):
        return text == "true"
    has_exponent = "e" in text.lower()
    if JSON_NUMBER.fullmatch(text) and not (has_exponent and operator in CONTAINS):
        return Decimal(text) if "." in text or has_exponent else int(text)
    if LIKE_A_NUMBER.fullmatch(text) and not text.isdigit() and operator not in CONTAINS:
        raise GiveUp(f"--where: {text} is no number for JSON; write it as 5, 0.5 or 1e3, or a text in quotes", USAGE)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text
