"""Which of several things a person means by a name."""

from collections.abc import Sequence
from typing import Any


def meters_called(meters: Sequence[dict[str, Any]], wanted: str) -> list[dict[str, Any]]:
    """The meters of this id or name; archived ones only where there is no other."""
    found = [meter for meter in meters if wanted in (meter["id"], meter["name"])]
    return [meter for meter in found if not meter.get("archived_at")] or found


def ids(things: Sequence[dict[str, Any]]) -> str:
    """The ids of things of one name, to choose from."""
    return ", ".join(str(one["id"]) for one in things)
