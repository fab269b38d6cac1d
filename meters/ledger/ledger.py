"""The credit ledger: credits, resets and the balance of each account.

``CreditGranted``, ``MeterReset`` and ``MovementWithdrawn`` are decisions in the control stream. ``Ledger.apply``
folds them into an ``Account`` for each customer and meter. ``floored`` adds credits up; ``rollover_units`` computes
what goes on into the next window.

* A reset begins a window. Credits of the newest window are added in order of time; the sum never falls below zero.
* Usage counts by the time it arrived, whatever its own timestamp. Usage may be negative.
* The balance is credits less usage; it may be below zero.
* A balance does not depend on the order in which decisions arrive: movements are ordered by (time, id).
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal, get_args

import msgspec
import xxhash

from meters.event import event_id
from meters.exact import EXACT

# Decisions. Each has an id, so applying a decision twice changes nothing, and a time ``at`` from which it holds.
# ``at`` may be before the time of the decision: a period ends when it was due, also if the news arrives later.

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


# The fold. The id of a movement with a cause (a grant, or a credit that is revoked) is derived from its cause. If a
# movement was decided at two times, because the first decision was not known, the earlier one stands.

ZERO = Decimal(0)


class Credit(msgspec.Struct, frozen=True, gc=False):
    """One movement of credited units. Its sort key is (``at``, ``id``)."""

    at: datetime
    id: str
    units: Decimal
    rollover: bool
    cause: Cause
    reference: str | None = None

    @property
    def sort_key(self) -> tuple[datetime, str]:
        """Where it stands among others."""
        return (self.at, self.id)


class Reset(msgspec.Struct, frozen=True, gc=False):
    """Where a window begins."""

    at: datetime
    id: str
    reference: str | None = None

    @property
    def sort_key(self) -> tuple[datetime, str]:
        """Where it stands among others."""
        return (self.at, self.id)


class Account(msgspec.Struct, gc=False):
    """One customer's credits and resets of one meter, each in its order. ``credited`` is of the newest window."""

    credits: list[Credit] = []
    resets: list[Reset] = []
    credited: Decimal = ZERO

    @property
    def since(self) -> datetime | None:
        """Where the newest window begins; None: at the beginning of everything."""
        return self.resets[-1].at if self.resets else None

    @property
    def moved_at(self) -> datetime:
        """The time of the newest movement."""
        return max(moved[-1].at for moved in (self.credits, self.resets) if moved)

    def window(self) -> Iterator[Credit]:
        """The credits of the newest window, in their order."""
        since = self.since
        return (credit for credit in self.credits if since is None or credit.at >= since)


def in_window(account: Account | None, at: datetime) -> datetime:
    """When something that is given now counts: where the clock has gone back behind the window, with its beginning."""
    return at if account is None or account.since is None else max(at, account.since)


def floored(units: Iterable[Decimal]) -> Decimal:
    """The running sum that never falls below zero."""
    total = ZERO
    for step in units:
        total = max(ZERO, EXACT.add(total, step))
    return total


def rollover_units(account: Account, consumed: Decimal, until: datetime | None = None) -> Decimal:
    """What of the rollover credits goes into the next window: other credits are used up first.

    ``consumed`` is the usage of the window that ends; ``until`` leaves out credits from that time on. Of N other
    credits, V with rollover and u units used, max(0, min(trunc(N + V - u), V)) are left.
    """
    counted = [credit for credit in account.window() if until is None or credit.at < until]
    plain = floored(credit.units for credit in counted if not credit.rollover)
    carried = floored(credit.units for credit in counted if credit.rollover)
    left = EXACT.subtract(EXACT.add(plain, carried), consumed)
    return max(ZERO, min(Decimal(int(left)), carried))


class Ledger:
    """All accounts. Changed by ``apply`` alone, which puts a new account in an old one's place: readers keep theirs."""

    def __init__(self) -> None:
        self._accounts: dict[str, dict[str, Account]] = {}  # by meter and customer
        self._meters_reset: set[str] = set()  # meters that were ever reset for anybody
        self._keys: dict[tuple[str, str], CreditGranted] = {}
        self._interned_units: dict[Decimal, Decimal] = {}  # equal amounts are one object: most are of a few sizes
        self._derived_ids: set[str] = set()  # made of a cause: only such credits can be decided twice, at two times
        self._is_shared = True

    @contextmanager
    def loading(self) -> Iterator[None]:
        """For what is known at a start: nobody has an account yet, so none is copied for its every credit."""
        self._is_shared = False
        try:
            yield
        finally:
            self._is_shared = True

    def apply(self, change: object) -> None:
        """Take in one change; others than credits and resets are somebody else's."""
        match change:
            case CreditGranted():
                self._credit(change)
            case MeterReset():
                self._reset(change)
            case MovementWithdrawn():
                self._withdraw(change)

    def _credit(self, change: CreditGranted) -> None:
        if change.key is not None:
            first = self._keys.setdefault((change.organization_id, change.key), change)
            if first.id != change.id:
                return  # decided twice, because nobody could tell that it was decided
        if change.reference is not None and self._is_known_as_early(change):
            return
        units = self._interned_units.setdefault(change.units, change.units)
        self._put(change.customer_id, change.meter_id, credit=Credit(
            change.at, change.id, units, change.rollover, change.cause, change.reference
        ))  # fmt: skip

    def _is_known_as_early(self, change: CreditGranted) -> bool:
        """Whether it is known from as early a time. What is known from a later one was the repetition, and goes."""
        if change.id not in self._derived_ids:
            self._derived_ids.add(change.id)
            return False
        known = self.account(change.customer_id, change.meter_id)
        told = next((credit for credit in known.credits if credit.id == change.id), None) if known else None
        if told is None or told.at <= change.at:
            return told is not None
        self._withdraw(MovementWithdrawn(
            id=change.id, organization_id=change.organization_id, customer_id=change.customer_id,
            meter_id=change.meter_id,
        ))  # fmt: skip
        return False

    def _reset(self, change: MeterReset) -> None:
        self._meters_reset.update(change.meter_ids)
        for meter_id in change.meter_ids:
            units = change.rollover.get(meter_id, ZERO)
            carried = Credit(change.at, change.id, units, True, "rollover", change.reference) if units > 0 else None
            self._put(change.customer_id, meter_id, carried, Reset(change.at, change.id, change.reference))

    def _withdraw(self, change: MovementWithdrawn) -> None:
        known = self.account(change.customer_id, change.meter_id)
        if known is None:
            return
        account = Account(
            [credit for credit in known.credits if credit.id != change.id],
            [reset for reset in known.resets if reset.id != change.id],
        )
        account.credited = floored(credit.units for credit in account.window())
        if account.credits or account.resets:
            self._accounts[change.meter_id][change.customer_id] = account
        else:
            del self._accounts[change.meter_id][change.customer_id]

    def _put(self, customer_id: str, meter_id: str, credit: Credit | None = None, reset: Reset | None = None) -> None:
        accounts = self._accounts.setdefault(meter_id, {})
        known = accounts.get(customer_id) or Account()
        account = Account(list(known.credits), list(known.resets), known.credited) if self._is_shared else known
        if reset is not None:
            _insert(account.resets, reset)
        newest = credit is not None and _insert(account.credits, credit)
        if credit is not None and newest and reset is None and (account.since is None or credit.at >= account.since):
            account.credited = floored((account.credited, credit.units))  # what came before it holds
        else:
            account.credited = floored(held.units for held in account.window())
        accounts[customer_id] = account

    def account(self, customer_id: str, meter_id: str) -> Account | None:
        """The account, if there ever was a credit or a reset."""
        return self._accounts.get(meter_id, {}).get(customer_id)

    def of_meter(self, meter_id: str) -> Mapping[str, Account]:
        """The meter's accounts by customer."""
        return self._accounts.get(meter_id, {})

    def has_resets(self, meter_id: str) -> bool:
        """Whether anybody's window of the meter ever began anew."""
        return meter_id in self._meters_reset

    def by_key(self, organization_id: str, key: str) -> CreditGranted | None:
        """What was decided for a request with this Idempotency-Key."""
        return self._keys.get((organization_id, key))


def _insert(held: list[Any], new: Credit | Reset) -> bool:
    """Into its place, unless it is there already; whether it is the last one now and was not there."""
    place = bisect_left(held, new.sort_key, key=lambda known: known.sort_key)
    if place < len(held) and held[place].id == new.id:
        return False
    held.insert(place, new)
    return place == len(held) - 1


def customer_meter_id(customer_id: str, meter_id: str) -> str:
    """The id of a customer's meter: a mix of both ids, from which, with the meter's, the customer's is found again."""
    return _mixed(int(customer_id.replace("-", ""), 16), meter_id)


def customer_of(customer_meter_id: str, meter_id: str) -> str:
    """The inverse: whose the customer meter is, if it is of this meter. Any id gives an answer; ask who that is."""
    return _mixed(int(customer_meter_id.replace("-", ""), 16), meter_id)


def _mixed(id: int, meter_id: str) -> str:
    mixed = id ^ _mask(meter_id)
    return event_id(mixed >> 64, mixed & (1 << 64) - 1)


@lru_cache(4096)  # meters are few, and each is asked for in every look for a customer meter
def _mask(meter_id: str) -> int:
    return xxhash.xxh3_128_intdigest(b"customer meter " + meter_id.encode())
