"""Check the ledger: balances against the credits, resets and usage that they are made of.

``check_ledger`` makes three comparisons. The store's copy of each decision must match the log's control stream. For
every account, the entries of its statement must add up to its credits. The balance that a running server shows must
match both, usage included. It also checks the forwarder's books: taken = accepted + waiting + refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

import msgspec

from aggregator.reconcile.report import Cause, Check, Counted, Difference, Quantities, Repair, Worth, add, between
from meters.catalogue.catalogue import Catalogue, decode_changes
from meters.exact import EXACT, amount_text
from meters.ledger.ledger import Account, CreditGranted, Ledger
from meters.ledger.statement import statement
from meters.meter import Meter

SIDES = "balances and the credits, resets and usage they are made of"
ZERO = Decimal(0)
NAMED_MAX = 3  # credits of one decision that are named where it differs
Decisions = Sequence[tuple[int, bytes]]


class Balance(msgspec.Struct, frozen=True):
    """What a running server keeps for one customer: credits, and usage since the reset beside its recount, if known."""

    customer_id: str
    credited: Decimal
    consumed: Decimal | None = None
    recounted: Decimal | None = None


class Outbox(NamedTuple):
    """The forwarder's books."""

    taken: int
    accepted: int
    waiting: int
    refused: int


class Books(NamedTuple):
    """What is compared, of one moment.

    ``stored`` is the store's copy of the decisions, by offset; it should have all before ``stored_until``.
    ``shown`` are a running server's balances by meter, None where none runs.
    """

    decisions: Decisions
    stored: Mapping[int, bytes]
    stored_until: int
    catalogue: Catalogue
    shown: Mapping[str, Sequence[Balance]] | None
    outbox: Outbox | None


def check_ledger(books: Books, worth: Worth) -> Check:
    """Compare all of it."""
    check = Check(name="ledger", sides=SIDES)
    _decisions(check, books, worth)
    ledger = Ledger()
    for _, value in books.decisions:
        for change in decode_changes(value):
            ledger.apply(change)
    for meter in books.catalogue.meters.values():
        accounts = ledger.of_meter(meter.id)
        _entries(check, meter, accounts)
        if books.shown is not None:
            _shown(check, books, meter, accounts, worth)
    if books.outbox is not None:
        _outbox(check, books.outbox)
    return check


def _decisions(check: Check, books: Books, worth: Worth) -> None:
    """The store's copy, up to where it says that it is: what is missing at its end shows in no row."""
    stored = books.stored
    ends = max(books.stored_until, max(stored, default=-1) + 1)
    log = {offset: line for offset, line in books.decisions if offset < ends}
    different = [offset for offset in sorted({*log, *stored}) if log.get(offset) != stored.get(offset)]
    for offset in different:
        check.add(_decision(offset, log.get(offset), stored.get(offset), books.catalogue, worth))
    check.counted.append(Counted("decisions of the log and in the store", len(log), len(different)))


def _decision(
    offset: int, value: bytes | None, copy: bytes | None, catalogue: Catalogue, worth: Worth
) -> Difference:
    cause = Cause.CHANGED if value and copy else Cause.LOST if value else Cause.UNFOUNDED
    ours, theirs = _credits(value), _credits(copy)
    credits = [credit for id, credit in (theirs | ours).items() if ours.get(id) != theirs.get(id)]
    quantities = between(_units(theirs.values()), _units(ours.values()))
    return Difference(
        check="ledger", cause=cause, where=_named(catalogue, credits) or f"decision {offset}", what=_said(value, copy),
        repair=Repair.REBUILD, quantities=worth.named(quantities), cents=worth.cents(quantities),
    )  # fmt: skip


def _credits(value: bytes | None) -> dict[str, CreditGranted]:
    """The credits of a decision by id; none of what cannot be read."""
    try:
        changes = decode_changes(value or b"")
    except (ValueError, msgspec.MsgspecError):
        return {}
    return {change.id: change for change in changes if isinstance(change, CreditGranted)}


def _units(credits: Iterable[CreditGranted]) -> Quantities:
    units: Quantities = {}
    for credit in credits:
        add(units, {credit.meter_id: credit.units})
    return units


def _meter_name(catalogue: Catalogue, credit: CreditGranted) -> str:
    meter = catalogue.meters.get(credit.meter_id)
    return meter.name if meter else credit.meter_id


def _named(catalogue: Catalogue, credits: Sequence[CreditGranted]) -> str:
    names = []
    for credit in credits[:NAMED_MAX]:
        who = catalogue.customers.get(credit.customer_id)
        customer = (who and who.external_id) or credit.customer_id
        names.append(f"{_meter_name(catalogue, credit)}, customer {customer}, credit {credit.id}")
    more = len(credits) - len(names)
    return "; ".join([*names, f"and {more} more"] if more else names)


def _said(value: bytes | None, copy: bytes | None) -> str:
    """What each side says: the lines that the other one has not, or all of them where only their order differs."""
    said = []
    for side, text, other in (("log", value, copy), ("store", copy, value)):
        others = set((other or b"").split(b"\n"))
        lines = [line for line in (text or b"").split(b"\n") if line not in others]
        words = b" ".join(lines or [text or b""]).decode("utf-8", "replace")
        said.append(f"the {side} {'says ' + words if text else 'has none'}")
    return "; ".join(said)


def _entries(check: Check, meter: Meter, accounts: Mapping[str, Account]) -> None:
    """Entries add up: what each moved the balance by, and what was left in the end."""
    different = 0
    for customer_id, account in accounts.items():
        entries = statement(meter.aggregation, account, [])
        total = ZERO
        for entry in entries:
            total = EXACT.add(total, entry.units)
        if not total == account.credited == (entries[-1].balance if entries else ZERO):
            different += 1
            what = f"the entries add up to {amount_text(total)}, the account says {amount_text(account.credited)}"
            check.add(_wrong(Cause.UNKNOWN, meter, customer_id, what, Repair.DECIDE))
    if accounts:
        check.counted.append(Counted(f"accounts of {meter.name}: entries and balance", len(accounts), different))


def _shown(
    check: Check, books: Books, meter: Meter, accounts: Mapping[str, Account], worth: Worth
) -> None:
    """What a running server shows."""
    shown = {balance.customer_id: balance for balance in (books.shown or {}).get(meter.id, ())}
    different = 0
    for customer_id in sorted({*shown, *accounts}):
        account, balance = accounts.get(customer_id), shown.get(customer_id)
        should, is_ = account.credited if account else ZERO, balance.credited if balance else ZERO
        quantities = {meter.id: EXACT.subtract(is_, should)}
        if should != is_:
            different += 1
            cause = Cause.LOST if is_ < should else Cause.DOUBLED
            what = f"the log's credits make {amount_text(should)}, the server shows {amount_text(is_)}"
            check.add(_wrong(cause, meter, customer_id, what, Repair.RESTART, quantities, worth))
    if shown:
        check.counted.append(Counted(f"balances of {meter.name} as shown", len(shown), different))
    _used(check, meter, shown.values(), worth)


def _used(check: Check, meter: Meter, shown: Iterable[Balance], worth: Worth) -> None:
    """Usage since the reset, where it was counted again."""
    recounted = [(balance, balance.recounted) for balance in shown if balance.recounted is not None]
    different = 0
    for balance, should in recounted:
        consumed = balance.consumed or ZERO
        if consumed != should:
            different += 1
            what = f"usage since the reset is {amount_text(should)}, and shown as {amount_text(consumed)}"
            moved = {meter.id: EXACT.subtract(consumed, should)}
            check.add(_wrong(Cause.CHANGED, meter, balance.customer_id, what, Repair.RESTART, moved, worth))
    if recounted:
        check.counted.append(Counted(f"usage of {meter.name} since resets", len(recounted), different))


def _wrong(
    cause: Cause, meter: Meter, customer_id: str, what: str, repair: Repair,
    quantities: Mapping[str, Decimal] | None = None, worth: Worth | None = None,
) -> Difference:  # fmt: skip
    given = quantities or {}
    return Difference(
        check="ledger", cause=cause, where=f"{meter.name}, customer {customer_id}", what=what, repair=repair,
        quantities=worth.named(given) if worth else {}, cents=worth.cents(given) if worth else None,
    )  # fmt: skip


def _outbox(check: Check, outbox: Outbox) -> None:
    """What was taken to be forwarded was accepted, waits, or is refused for good."""
    gap = outbox.taken - outbox.accepted - outbox.waiting - outbox.refused
    said = f"{outbox.taken} taken, {outbox.accepted} accepted, {outbox.waiting} waiting, {outbox.refused} refused"
    check.counted.append(Counted("events taken to be forwarded", outbox.taken, abs(gap)))
    if gap:
        cause = Cause.LOST if gap > 0 else Cause.DOUBLED
        check.add(Difference(
            check="ledger", cause=cause, where="the forwarder's books", what=said, repair=Repair.DECIDE,
            count=abs(gap),
        ))  # fmt: skip
