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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, NamedTuple, get_args

import msgspec
import xxhash
from msgspec.structs import replace

from meters.event import event_id
from meters.exact import EXACT
from meters.ledger.joined import CustomersJoined, Joined
from meters.ledger.requests import AnsweredRequests, RequestAnswered

# Decisions. Each has an id, so applying a decision twice changes nothing, and a time ``at`` from which it holds.
# ``at`` may be before the time of the decision: a period ends when it was due, also if the news arrives later.

Cause = Literal["grant", "cycle", "revoke", "credit", "rollover"]
"""Why units came or went: a benefit, its renewal, taking back, somebody's decision, what a reset carried over."""

CAUSES: tuple[Cause, ...] = get_args(Cause)

UNITS_MAX = 2**31 - 1
"""Units of one credit (Polar's limit)."""


POLARS = "polar:"
"""The prefix of the ids of movements that follow from Polar's news."""


class CreditGranted(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="credit.granted"):
    """A customer has ``units`` more of a meter, or fewer where they are negative.

    ``rollover``: what is left of them at a reset goes into the next window. ``reference`` names what this came from: a
    grant of a benefit, or the credit that is taken back; ``id`` is made of it then. ``takes`` is the id of the credit
    that this one takes back: it takes what the customer holds of that credit, and ``units`` states all of it. Records
    of older versions do not name that credit, and Polar's take-backs do not: their units go from the running sum of all
    credits. Only such records have ``key``, the Idempotency-Key of the request, and ``content``, a digest of its body.
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
    takes: str | None = None


class WindowUsage(msgspec.Struct, frozen=True):
    """The ``units`` used in the window that began at ``since`` (None: at the beginning) and that a reset ended."""

    since: datetime | None
    units: Decimal


class MeterReset(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="meter.reset"):
    """From ``at`` on the customer's meters count from nothing, and credits before it are gone.

    ``rollover`` has the units of each meter that are carried over: they are a credit with rollover at the same time.
    ``used`` is the usage that this follows from. Where it is known for the window that the reset ends, the units that
    are carried over follow from it and from the credits of the window, whatever is decided later about the time before
    the reset; otherwise ``rollover`` holds, as in records of older versions. A reset that is decided again under its id
    adds usage of other windows. ``reference`` names what made the reset: a grant that was renewed, a subscription.
    """

    id: str
    organization_id: str
    customer_id: str
    meter_ids: list[str]
    at: datetime
    rollover: dict[str, Decimal] = {}
    reference: str | None = None
    used: dict[str, WindowUsage] = {}


class MovementWithdrawn(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="movement.withdrawn"):
    """A credit or a reset that news from elsewhere called for turned out otherwise, as later news show.

    What was decided here is never withdrawn: it is taken back by another credit.
    """

    id: str
    organization_id: str
    customer_id: str
    meter_id: str


Movement = CreditGranted | MeterReset | MovementWithdrawn
CreditChange = Movement | CustomersJoined | RequestAnswered


def revocation_id(credit_id: str) -> str:
    """The id of the credit that takes another one back: the same however often it is taken back."""
    return f"{credit_id}-revoked"


# The fold. The id of a movement with a cause (a grant, or a credit that is revoked) is derived from its cause. If a
# movement was decided at two times, because the first decision was not known, the earlier one stands.
#
# A take-back names the credit that it takes. In the window of that credit it takes all of it, used or not. After a
# reset it takes the units of the credit that were carried into its own window, if any; of carried units the oldest
# credit was used first. A take-back that names no credit (Polar's, and those in records of older versions) lowers a
# running sum that never falls below zero; Polar's lowers the sum of Polar's credits.

ZERO = Decimal(0)


class Credit(msgspec.Struct, frozen=True, gc=False):
    """One movement of credited units. Its sort key is (``at``, ``id``). ``takes`` names the credit it takes back."""

    at: datetime
    id: str
    units: Decimal
    rollover: bool
    cause: Cause
    reference: str | None = None
    takes: str | None = None

    @property
    def sort_key(self) -> tuple[datetime, str]:
        """Where it stands among others."""
        return (self.at, self.id)


class Reset(msgspec.Struct, frozen=True, gc=False):
    """Where a window begins. ``used`` is the usage of the windows that it ended, by where they began.

    ``carried`` are the units that were carried over as they were decided; they hold where no usage is known.
    """

    at: datetime
    id: str
    reference: str | None = None
    carried: Decimal = ZERO
    used: tuple[tuple[datetime | None, Decimal], ...] = ()

    @property
    def sort_key(self) -> tuple[datetime, str]:
        """Where it stands among others."""
        return (self.at, self.id)


class Account(msgspec.Struct, gc=False):
    """One customer's credits and resets of one meter, each in its order. ``credited`` is of the newest window.

    The credits have what each reset carried over.
    """

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


def in_window(account: Account | None, at: datetime) -> datetime:
    """When something that is given now counts: where the clock has gone back behind the window, with its beginning."""
    return at if account is None or account.since is None else max(at, account.since)


def floored(units: Iterable[Decimal]) -> Decimal:
    """The running sum that never falls below zero."""
    total = ZERO
    for step in units:
        total = max(ZERO, EXACT.add(total, step))
    return total


Pool = Literal["polars", "plain", "rollover"]
"""Credits that floor together: Polar's, and those that were given here by their kind."""


class Held(NamedTuple):
    """Units of one credit that a window has."""

    units: Decimal
    pool: Pool
    rollover: bool
    reference: str | None


class Window:
    """The credits of one window, added up one by one.

    ``_sums`` is what is credited. What rolls over follows from the units that are held of each credit: there Polar
    floors each kind apart, too, so they may be more than what is credited.
    """

    def __init__(self, before: "Window | None" = None) -> None:
        self._held: dict[str, Held] = {}  # by credit, in the order of age
        self._before = dict(before._held) if before else {}
        self._sums: dict[Pool, Decimal] = {"polars": ZERO, "plain": ZERO, "rollover": ZERO}

    @property
    def credited(self) -> Decimal:
        """The units that are credited by now."""
        return _total(self._sums.values())

    @property
    def rolling(self) -> Decimal:
        """The units that may go into the next window."""
        return _total(held.units for held in self._held.values() if held.rollover)

    def of(self, credit_id: str) -> Decimal:
        """The units of a credit that the window has: what a take-back takes."""
        held = self._held.get(credit_id)
        return held.units if held else ZERO

    def carries(self, used: Decimal) -> Decimal:
        """The units that a reset after this usage carries over: credits without rollover are used first.

        Of N such units, V with rollover and u units used, max(0, min(trunc(N + V - u), V)) are left.
        """
        left = EXACT.subtract(_total(held.units for held in self._held.values()), used)
        return max(ZERO, min(Decimal(int(left)), self.rolling))

    def add(self, credit: Credit) -> None:
        """Add the next movement."""
        pool: Pool = "polars" if credit.id.startswith(POLARS) else "rollover" if credit.rollover else "plain"
        if credit.cause == "rollover":
            self._carry(credit, pool)
        elif credit.takes is not None:
            self._take_back(credit.takes)
        elif credit.units < 0:
            self._lower(credit, pool)
        else:
            self._give(credit.id, Held(credit.units, pool, credit.rollover, credit.reference))

    def _give(self, id: str, held: Held) -> None:
        self._held[id] = held
        self._sums[held.pool] = EXACT.add(self._sums[held.pool], held.units)

    def _take_back(self, id: str) -> None:
        held = self._held.pop(id, None)
        if held is not None:
            self._sums[held.pool] = floored((self._sums[held.pool], -held.units))

    def _lower(self, credit: Credit, pool: Pool) -> None:
        """Take units that belong to no credit by name: Polar's from Polar's, others from all there is."""
        left, others = -credit.units, () if pool == "polars" else tuple(self._sums)
        for of in (pool, *others):
            gone = min(left, self._sums[of])
            self._sums[of], left = EXACT.subtract(self._sums[of], gone), EXACT.subtract(left, gone)
        kind = [id for id, one in self._held.items() if (one.pool, one.rollover) == (pool, credit.rollover)]
        own = [id for id in kind if credit.reference in (id, self._held[id].reference)] if credit.reference else []
        left = -credit.units
        for id in (*reversed(own), *kind):
            left = EXACT.subtract(left, self._reduce(self._held, id, left))

    def _carry(self, credit: Credit, pool: Pool) -> None:
        """Take over units of the window before: of its credits the newest ones are left."""
        left, parts = credit.units, dict[str, Held]()
        for id, held in reversed(list(self._before.items())):
            if held.rollover and (units := self._reduce(self._before, id, left)):
                parts[id], left = held._replace(units=units), EXACT.subtract(left, units)
        if left > 0:
            parts[credit.id] = Held(left, pool, True, credit.reference)
        younger, self._held = self._held, {}  # what was given at the same instant is not as old
        for id, part in reversed(parts.items()):
            self._give(id, part)
        self._held |= younger

    @staticmethod
    def _reduce(held: dict[str, Held], id: str, most: Decimal) -> Decimal:
        gone = min(most, held[id].units)
        held[id] = held[id]._replace(units=EXACT.subtract(held[id].units, gone))
        return gone


def _total(units: Iterable[Decimal]) -> Decimal:
    total = ZERO
    for one in units:
        total = EXACT.add(total, one)
    return total


class Move(NamedTuple):
    """A movement, what is credited after it, and the window that it is in."""

    movement: Credit | Reset
    credited: Decimal
    window: Window


class Ending(NamedTuple):
    """A window that a reset ends: where it began, and its usage if that is known."""

    reset: Reset
    since: datetime | None
    used: Decimal | None
    window: Window


def moves(account: Account) -> Iterator[Move]:
    """Every movement in its order. At one instant: resets, then credits, then what takes credits back."""
    for move in _folded(account):
        if isinstance(move, Move):
            yield move


def uncounted(account: Account, since: datetime) -> Ending | None:
    """The first window, of those that end at ``since`` or later, whose usage has to be known for what it carries."""
    endings = (one for one in _folded(account) if isinstance(one, Ending))
    return next((one for one in endings if one.used is None and one.reset.at >= since and one.window.rolling), None)


def newest_window(account: Account | None, until: datetime | None = None) -> Window:
    """The newest window; ``until`` leaves out what is moved from that time on."""
    known, window = account or Account(), Window()
    if until is not None:
        earlier = [credit for credit in known.credits if credit.at < until]
        known = Account(earlier, [reset for reset in known.resets if reset.at < until])
    for move in moves(known):
        window = move.window
    return window


def rollover_units(account: Account, consumed: Decimal, until: datetime | None = None) -> Decimal:
    """What of the rollover credits goes into the next window after this usage of the newest one."""
    return newest_window(account, until).carries(consumed)


def _folded(account: Account) -> Iterator[Move | Ending]:
    told, place = _placed(account.credits), 0
    window, since, carried = Window(), None, list[Credit]()
    for at, together in groupby(account.resets, key=lambda reset: reset.at):
        end = bisect_left(told, at, lo=place, key=lambda one: one[0][0])
        for credit in _in_order(told[place:end], carried):
            window.add(credit)
            yield Move(credit, window.credited, window)
        resets, place = list(together), end
        used = next((units for reset in resets for begun, units in reset.used if begun == since), None)
        yield Ending(resets[0], since, used, window)
        if used is None:
            carried = [_carried(reset, reset.carried) for reset in resets]
        else:
            carried = [_carried(resets[0], window.carries(used))]
        window, since = Window(window), at
        for reset in resets:
            yield Move(reset, ZERO, window)
    for credit in _in_order(told[place:], carried):
        window.add(credit)
        yield Move(credit, window.credited, window)


Placed = tuple[tuple[datetime, bool, str], Credit]


def _placed(credits: Sequence[Credit]) -> list[Placed]:
    """What was told, in order. What takes a credit back is never before the credit, whatever time it states."""
    names = {credit.takes for credit in credits if credit.takes is not None}
    given = {credit.id: credit.at for credit in credits if credit.id in names}
    placed = [
        ((max(credit.at, given.get(credit.takes or "", credit.at)), credit.takes is not None, credit.id), credit)
        for credit in credits
        if credit.cause != "rollover"
    ]
    return sorted(placed, key=lambda one: one[0]) if names else placed


def _in_order(told: list[Placed], carried: list[Credit]) -> list[Credit]:
    if any(one.units for one in carried):
        told = sorted(
            [*told, *(((one.at, False, one.id), one) for one in carried if one.units)], key=lambda one: one[0]
        )
    return [credit for _, credit in told]


def _carried(reset: Reset, units: Decimal) -> Credit:
    return Credit(reset.at, reset.id, units, True, "rollover", reset.reference)


def _added_up(account: Account) -> None:
    """Bring what follows from the account's movements to what they are now."""
    told = [credit for credit in account.credits if credit.cause != "rollover"]
    account.credited, carried = ZERO, list[Credit]()
    for move in moves(account):
        account.credited = move.credited
        if isinstance(move.movement, Credit) and move.movement.cause == "rollover":
            carried.append(move.movement)
    account.credits = sorted([*told, *carried], key=lambda credit: credit.sort_key) if carried else told


class Ledger:
    """All accounts. Changed by ``apply`` alone, which puts a new account in an old one's place: readers keep theirs."""

    def __init__(self) -> None:
        self._accounts: dict[str, dict[str, Account]] = {}  # by meter and customer
        self._meters_reset: set[str] = set()  # meters that were ever reset for anybody
        self.answered = AnsweredRequests()
        self._keys: dict[tuple[str, str], CreditGranted] = {}  # of older versions
        self._interned_units: dict[Decimal, Decimal] = {}  # equal amounts are one object: most are of a few sizes
        self._derived_ids: set[str] = set()  # made of a cause: only such credits can be decided twice, at two times
        self._taken: set[str] = set()  # credits that are taken back by name
        self._joined = Joined()
        self._meters: dict[str, list[str]] = {}  # by organization: its meters that have accounts
        self._is_shared = True
        self._unsettled: dict[int, Account] = {}  # while loading: accounts that are added up at its end

    @contextmanager
    def loading(self) -> Iterator[None]:
        """For what is known at a start: nobody has an account yet, so none is copied for its every credit."""
        self._is_shared = False
        try:
            yield
        finally:
            self._is_shared = True
            for account in self._unsettled.values():
                _added_up(account)
            self._unsettled = {}

    def trial(self, customer_id: str, meter_id: str) -> "Ledger":
        """A ledger of this account alone, to see what changes would make of it."""
        trial, known = Ledger(), self.account(customer_id, meter_id)
        if known is not None:
            trial._accounts = {meter_id: {customer_id: known}}
            trial._derived_ids = {credit.id for credit in known.credits}
            trial._taken = {credit.takes for credit in known.credits if credit.takes is not None}
        return trial

    def apply(self, change: object) -> None:
        """Take in one change; others than credits and resets are somebody else's."""
        match change:
            case RequestAnswered():
                self.answered.apply(change)
            case CreditGranted() | MeterReset() if self.answered.is_repeated(change.id):
                pass
            case CreditGranted():
                self._credit(change)
            case MeterReset():
                self._reset(change)
            case MovementWithdrawn():
                self._withdraw(change)
            case CustomersJoined():
                self._join(change)

    def _join(self, change: CustomersJoined) -> None:
        """Put two customers' accounts together: all movements of both, and windows whose usage is yet to be counted."""
        into = self._joined.join(change)
        if into is None:
            return
        for accounts in [self._accounts[id] for id in self._meters.get(change.organization_id, ())]:
            known = [accounts[id] for id in (into, change.id) if id in accounts]
            if known:
                credits = {credit.id: credit for account in known for credit in account.credits}
                resets = {reset.id: replace(reset, used=()) for account in known for reset in account.resets}
                account = Account(
                    sorted(credits.values(), key=lambda one: one.sort_key),
                    sorted(resets.values(), key=lambda one: one.sort_key),
                )
                _added_up(account)
                accounts[into] = account
                accounts.pop(change.id, None)

    def _credit(self, change: CreditGranted) -> None:
        if change.key is not None:
            first = self._keys.setdefault((change.organization_id, change.key), change)
            if first.id != change.id:
                return  # decided twice, because nobody could tell that it was decided
        if change.reference is not None and self._is_known_as_early(change):
            return
        units = self._interned_units.setdefault(change.units, change.units)
        if change.takes is not None:
            self._taken.add(change.takes)
        self._put(change, change.meter_id, credit=Credit(
            change.at, change.id, units, change.rollover, change.cause, change.reference, change.takes
        ))  # fmt: skip

    def _is_known_as_early(self, change: CreditGranted) -> bool:
        """Whether it is known from as early a time. What is known from a later one was the repetition, and goes."""
        if change.id not in self._derived_ids:
            self._derived_ids.add(change.id)
            return False
        known = self.account(self._whose(change), change.meter_id)
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
            used = change.used.get(meter_id)
            self._put(change, meter_id, reset=Reset(
                change.at, change.id, change.reference, change.rollover.get(meter_id, ZERO),
                ((used.since, used.units),) if used else (),
            ))  # fmt: skip

    def _withdraw(self, change: MovementWithdrawn) -> None:
        customer_id = self._whose(change)
        known = self.account(customer_id, change.meter_id)
        if known is None:
            return
        account = Account(
            [credit for credit in known.credits if credit.id != change.id],
            [reset for reset in known.resets if reset.id != change.id],
        )
        _added_up(account)
        if account.credits or account.resets:
            self._accounts[change.meter_id][customer_id] = account
        else:
            del self._accounts[change.meter_id][customer_id]

    def _whose(self, change: Movement) -> str:
        """The customer of a movement, whose id may name another customer by now."""
        return self._joined.customer_of(change.organization_id, change.customer_id)

    def _put(
        self, change: Movement, meter_id: str, credit: Credit | None = None, reset: Reset | None = None
    ) -> None:  # fmt: skip
        customer_id = self._whose(change)
        if meter_id not in self._accounts:
            self._accounts[meter_id] = {}
            self._meters.setdefault(change.organization_id, []).append(meter_id)
        accounts = self._accounts[meter_id]
        known = accounts.get(customer_id) or Account()
        account = Account(list(known.credits), list(known.resets), known.credited) if self._is_shared else known
        if reset is not None:
            _insert_reset(account.resets, reset)
        is_last = credit is not None and _insert(account.credits, credit)
        if credit is not None and is_last and self._only_adds(account, credit):
            account.credited = EXACT.add(account.credited, credit.units)  # what came before it holds
        elif self._is_shared:
            _added_up(account)
        else:
            self._unsettled[id(account)] = account
        accounts[customer_id] = account

    def _only_adds(self, account: Account, credit: Credit) -> bool:
        is_given = credit.takes is None and credit.units >= 0 and credit.id not in self._taken
        return is_given and (account.since is None or credit.at >= account.since)

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
        """What an older version decided for a request with this Idempotency-Key, of whichever customer."""
        return self._keys.get((organization_id, key))


def _insert(held: list[Any], new: Credit | Reset) -> bool:
    """Into its place, unless it is there already; whether it is the last one now and was not there."""
    place = bisect_left(held, new.sort_key, key=lambda known: known.sort_key)
    if place < len(held) and held[place].id == new.id:
        return False
    held.insert(place, new)
    return place == len(held) - 1


def _insert_reset(held: list[Reset], new: Reset) -> None:
    """Into its place. One that is there already gets to know the usage of further windows."""
    place = bisect_left(held, new.sort_key, key=lambda known: known.sort_key)
    if place == len(held) or held[place].id != new.id:
        held.insert(place, new)
        return
    known = held[place]
    used = dict(sorted({*known.used, *new.used}, key=_by_window))  # of one window that was counted twice: the most
    held[place] = replace(known, carried=max(known.carried, new.carried), used=tuple(used.items()))


def _by_window(used: tuple[datetime | None, Decimal]) -> tuple[bool, datetime | None, Decimal]:
    return used[0] is not None, used[0], used[1]


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
