"""Which meter here is which of Polar's.

What Polar told is kept under Polar's id of the meter: which one it is here may be said later, and may change. So
whoever shows what was told, or acts on it, asks here each time.
"""

from collections.abc import Iterable
from typing import TypeVar

from msgspec.structs import replace

from meters.benefits import Benefit, Grant
from meters.catalogue import Catalogue
from meters.meter import Meter

METER_KEY = "polar_meter_id"
"""The key of a meter's metadata that says which of Polar's meters it is, where its id is another one."""

T = TypeVar("T", Benefit, Grant)


def meter_of(catalogue: Catalogue, organization_id: str, polar_id: str) -> Meter | None:
    """The organization's meter that is Polar's: of the same id, or said to be so in its metadata."""
    if (same := catalogue.meter(organization_id, polar_id)) is not None:
        return same
    return next((one for one in catalogue.meters_of(organization_id) if one.metadata.get(METER_KEY) == polar_id), None)


def meters_here(catalogue: Catalogue, organization_id: str, polar_ids: Iterable[str]) -> list[str]:
    """The ids of the meters here that these are, each once, without those that are not known here."""
    found = (meter_of(catalogue, organization_id, polar_id) for polar_id in polar_ids)
    return list(dict.fromkeys(meter.id for meter in found if meter is not None))


def here(catalogue: Catalogue, thing: T) -> T:
    """The same with the id that its meter has here; with Polar's, while the meter is not known."""
    name = "meter_id" if isinstance(thing, Benefit) else "last_credited_meter_id"
    known = meters_here(catalogue, thing.organization_id, filter(None, [getattr(thing, name)]))
    return replace(thing, **{name: known[0]}) if known else thing
