"""What every strategy is made of: whose usage it is, what an event says, what it cost, and how it is handed over.

A strategy turns a thing that happened (a call, a stream, some time) into the metadata of one event. It builds on
``Strategy``: ``emit`` puts together what the strategy measured, what was given for every event and what was given for
this one, adds the cost, and captures the event. ``emit`` never raises: metering is not why a call may fail.

    class Words(Strategy):
        def count(self, customer: CustomerLike, text: str, **metadata: Value) -> None:
            self.emit(customer, {"words": len(text.split()), "strategy": "Words"}, metadata)

    ingestion.strategy(Words, "words", plan="pro").count("user-1", "so it goes")
"""

import copy
import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any, Protocol, Self, TypeVar

import msgspec

from ingest.client.event import Event
from ingest.client.reading import text
from ingest.client.values import COST, clean

logger = logging.getLogger(__name__)

Value = str | int | float | bool | Decimal | datetime | None
"""What ordinary metadata may hold."""

Cost = int | float | str | Decimal | Mapping[str, Any] | None
"""Cents (US), or ``{"amount": cents, "currency": "usd"}``; None when it is not known."""


class Customer(msgspec.Struct, frozen=True, kw_only=True):
    """Whose usage it is, by your id (``external_customer_id``) or the server's; and which of its members'."""

    external_customer_id: str | None = None
    customer_id: str | None = None
    external_member_id: str | None = None
    member_id: str | None = None


CustomerLike = str | Customer
"""A string is an external customer id."""

Who = CustomerLike | Callable[[], CustomerLike | None]
"""Whose call it is, or a function that says so when the call begins; None means that this call is not metered."""


class Capturing(Protocol):
    """Whatever takes events: an Ingestion, an AsyncIngestion, or the recording one of ``ingest.client.testing``."""

    def capture(self, event: Event | Mapping[str, Any]) -> str | None:
        """Take an event without waiting for the server; its id, or None when it was refused."""


class Strategy:
    """The base of every strategy, made by ``ingestion.strategy(Class, "event name", **metadata)``.

    ``metadata`` goes with every event. Keyword arguments of a subclass are declared by overriding ``__init__`` with
    the same first three parameters.
    """

    def __init__(self, event_name: str, ingestion: Capturing, metadata: Mapping[str, Any] | None = None) -> None:
        self.event_name = event_name
        self._ingestion = ingestion
        self._metadata = dict(metadata or {})
        self._cost: Callable[[Any], Cost] | None = None

    def cost(self, calculate: Callable[[Any], Cost]) -> Self:
        """The same strategy whose events carry ``_cost``.

        ``calculate`` gets what the strategy documents as its context (by default the measured metadata) and returns
        cents. Decimals stay exact; more than 12 decimals are rounded half to even; None leaves the cost out.
        """
        priced = copy.copy(self)
        priced._cost = calculate
        return priced

    def resolve(self, who: Who | None) -> Customer | None:
        """Whose usage begins now. None, with a warning, when nobody can say. Never raises."""
        try:
            found = who() if callable(who) else who
        except Exception:
            logger.exception("asking for the customer failed", extra={"event_name": self.event_name})
            return None
        if found is None:
            logger.warning("a call is not metered: nobody says whose it is", extra={"event_name": self.event_name})
            return None
        return Customer(external_customer_id=found) if isinstance(found, str) else found

    def emit(
        self,
        customer: CustomerLike,
        measured: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        *,
        context: Any = None,
        name: str | None = None,
        external_id: str | None = None,
        parent_id: str | None = None,
        timestamp: datetime | None = None,
    ) -> str | None:
        """Capture one event; its id, or None when it was refused. Never raises.

        ``measured`` is the strategy's own, overridden by the strategy's static metadata, and that by ``metadata`` of
        this event. ``context`` is what a cost function gets; the measured metadata when it is None.
        """
        try:
            together = {**measured, **self._metadata, **(metadata or {})}
            if self._cost is not None:
                _add_cost(together, self._cost, measured if context is None else context)
            who = Customer(external_customer_id=customer) if isinstance(customer, str) else customer
            return self._ingestion.capture(
                Event(
                    name=name or self.event_name, metadata=together, external_id=external_id, parent_id=parent_id,
                    timestamp=timestamp, external_customer_id=who.external_customer_id, customer_id=who.customer_id,
                    external_member_id=who.external_member_id, member_id=who.member_id,
                )
            )  # fmt: skip
        except Exception:
            logger.exception("an event could not be captured", extra={"event_name": self.event_name})
            return None


def customer_in(*sources: Any) -> Customer | None:
    """The customer that somebody wrote down: ``external_customer_id`` or ``customer_id``, also in Polar's spelling."""
    for source in sources:
        for field, other in (("external_customer_id", "externalCustomerId"), ("customer_id", "customerId")):
            if found := text(source, field) or text(source, other):
                return Customer(**{field: found})
    return None


def _add_cost(metadata: dict[str, Any], calculate: Callable[[Any], Cost], context: Any) -> None:
    """A cost function that fails costs the event its cost, not its existence."""
    try:
        amount = calculate(context)
        if amount is not None:
            cost = amount if isinstance(amount, Mapping) else {"amount": amount, "currency": "usd"}
            metadata.update(clean({COST: cost}))
    except Exception:
        logger.exception("a cost function failed; the event goes without cost")


S = TypeVar("S", bound=Strategy)
