"""What Polar tells of one customer, and the catalogue after it."""

from datetime import UTC, datetime, timedelta
from typing import Any

from meters.catalogue.catalogue import Catalogue, Change
from meters.catalogue.polar_facts import DeliveryApplied, Period, Told, Wanted
from meters.polar_webhooks import News, read

T0 = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
Json = dict[str, Any]
CUSTOMER = "0e1d7f2a-6f63-4c6c-8a53-111111111111"
AGAIN = "0e1d7f2a-6f63-4c6c-8a53-222222222222"


def customer(day: int = 0, **fields: Any) -> Json:
    """Polar's customer, as changed on a day."""
    return {"id": CUSTOMER, "created_at": T0.isoformat(), "modified_at": (T0 + day * DAY).isoformat(),
            "email": "c@x.org", "external_id": "c-here", "metadata": {}, **fields}  # fmt: skip


def grant(day: int, units: int = 100, revoked: int | None = None, id: str = "g", before: int | None = None) -> Json:
    """A grant that credited on a day, perhaps taken back on another; ``before`` is the day it credited before."""
    def credited(day: int | None) -> Json | None:
        at = {} if day is None else {"last_credited_at": (T0 + day * DAY).isoformat(), "last_credited_units": units}
        return at and {"last_credited_meter_id": "m", **at}

    changed = T0 + (day if revoked is None else revoked) * DAY
    return {"id": id, "created_at": T0.isoformat(), "modified_at": changed.isoformat(), "customer_id": CUSTOMER,
            "customer": customer(), "is_revoked": revoked is not None,
            "revoked_at": None if revoked is None else changed.isoformat(),
            "benefit": {"id": f"b-{id}", "type": "meter_credit", "created_at": T0.isoformat(),
                        "properties": {"meter_id": "m", "units": units, "rollover": False}},
            "properties": {} if revoked is not None else credited(day),
            "previous_properties": credited(day if revoked is not None else before)}  # fmt: skip


def ended(at: Json, day: int, *, kept: bool = False) -> Json:
    """A grant as Polar tells of its end on a day: what was credited, and the taking back or, if ``kept``, the same."""
    before, end = at["properties"], T0 + day * DAY
    back = {"last_credited_units": -before["last_credited_units"], "last_credited_at": end.isoformat()}
    later = (end + DAY / 2).isoformat()  # the end comes after its taking back, and the change after both
    return at | {"is_revoked": True, "revoked_at": later, "modified_at": later, "previous_properties": before,
                 "properties": before if kept else before | back}  # fmt: skip


def period(day: int, status: str = "active", ended: int | None = None, **fields: Any) -> Json:
    """A subscription with a price for the meter, in the period that began on a day."""
    return {"id": "s", "created_at": T0.isoformat(), "modified_at": (T0 + (ended or day) * DAY).isoformat(),
            "status": status, "customer_id": CUSTOMER, "product_id": "p", "customer": customer(),
            "current_period_start": (T0 + day * DAY).isoformat(), "prices": [{"id": "x", "meter_id": "m"}],
            "ended_at": None if ended is None else (T0 + ended * DAY).isoformat(), **fields}  # fmt: skip


def said(catalogue: Catalogue, kind: str, data: Json) -> News:
    """What a delivery makes."""
    news = read(catalogue, "org", delivery_id="any", kind=kind, data=data, now=T0 + 99 * DAY)
    assert news is not None
    return news


def told(deliveries: list[tuple[str, Json]], *before: Change) -> Catalogue:
    """A catalogue after some decisions and the deliveries, each of these twice."""
    catalogue = Catalogue(before)
    for kind, data in [*deliveries, *deliveries]:
        for change in said(catalogue, kind, data).changes:
            catalogue.apply(change)
    return catalogue


def days(wanted: Wanted) -> tuple[list[int], list[tuple[int, bool, int | None]]]:
    """What is wanted, with days for times."""
    def day(at: datetime) -> int:
        return (at - T0) // DAY

    given = [(day(g.fact.at), g.is_cycle, None if g.revoked is None else day(g.revoked)) for g in wanted.given]
    return [day(at) for at in wanted.cuts], given


def record(organization: str, *told: Told, id: str = "1") -> DeliveryApplied:
    """A delivery with these facts and periods."""
    periods = [one for one in told if isinstance(one, Period)]
    facts = [one for one in told if not isinstance(one, Period)]
    return DeliveryApplied(organization_id=organization, delivery_id=id, kind="k", at=T0, facts=facts, periods=periods)
