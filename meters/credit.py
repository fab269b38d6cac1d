"""What the ledger is told: units given to a customer or taken back, and resets after which a meter begins anew.

Each is a decision in the control stream with an id of its own, so that being told twice is being told once. Each
states the time from which it holds, ``at``, which may be before it was decided (a period ends when it was due, also
when the news of it comes later) and by which, with the id to break ties, the ledger orders what it knows. No order of
telling changes a balance.
"""

from datetime import datetime
from decimal import Decimal
from typing import Literal, get_args

import msgspec

Cause = Literal["grant", "cycle", "revoke", "credit", "rollover"]
"""Why units came or went: a benefit, its renewal, taking back, somebody's decision, what a reset carried over."""

CAUSES: tuple[Cause, ...] = get_args(Cause)

UNITS_MAX = 2**31 - 1
"""Units of one credit (Polar's limit)."""


class CreditGranted(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="credit.granted"):
    """A customer has ``units`` more of a meter, or fewer where they are negative.

    ``rollover``: what is left of them at a reset goes into the next window. ``reference`` names what this came from: a
    grant of a benefit, or the credit that is taken back; ``id`` is made of it then. ``key`` is the request's
    Idempotency-Key and ``content`` the digest of its body.
    """

    id: str
    organization_id: str
    customer_id: str
    meter_id: str
    units: Decimal
    at: datetime
    rollover: bool = False
    cause: Cause = "credit"
    reference: str | None = None
    key: str | None = None
    content: str | None = None


class MeterReset(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="meter.reset"):
    """From ``at`` on the customer's meters count from nothing, and credits before it are gone.

    ``rollover`` has the units of each meter that are carried over: they are a credit with rollover at the same time.
    They are worked out once, when the reset is decided, as with Polar. ``reference`` names what made the reset: a grant
    that was renewed, a subscription.
    """

    id: str
    organization_id: str
    customer_id: str
    meter_ids: list[str]
    at: datetime
    rollover: dict[str, Decimal] = {}
    reference: str | None = None


class MovementWithdrawn(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="movement.withdrawn"):
    """A credit or a reset that news from elsewhere called for turned out otherwise, as later news show.

    What was decided here is never withdrawn: it is taken back by another credit.
    """

    id: str
    organization_id: str
    customer_id: str
    meter_id: str


CreditChange = CreditGranted | MeterReset | MovementWithdrawn


def revocation_id(credit_id: str) -> str:
    """The id of the credit that takes another one back: the same however often it is taken back."""
    return f"{credit_id}-revoked"
