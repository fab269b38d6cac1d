"""Serializers: build the API's answers (``aggregator.service.answers``) from stored objects, without losing digits.

There is one ``*_shape`` function for each kind of object. Metadata is passed on as the tokens that were sent. The
reserved keys are the exception: ``_cost.amount`` becomes a string, because both Python clients require one, with at
least one decimal, because Polar writes doubles; numbers that were sent as text become numbers; unknown keys are
dropped.
"""

from collections.abc import Mapping
from decimal import Decimal

import msgspec

from aggregator.service import answers
from aggregator.service.balances import CustomerMeter
from aggregator.store.queries.events import DeadLetter, EventName, StoredEvent
from meters import exact
from meters.catalogue.catalogue import TEAM, Catalogue, Customer, meter_json
from meters.event import event_id
from meters.event_values import RESERVED, number_token, steps
from meters.exact import amount_text, decimal_text, parse_amount
from meters.ledger.ledger import Credit, CreditGranted, MeterReset
from meters.ledger.price import Price
from meters.ledger.statement import Entry
from meters.meter import Meter

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
Json = dict[str, object]
"""An object of an answer, before it is encoded."""


def number(amount: Decimal) -> msgspec.Raw:
    """A JSON number of exactly these digits."""
    return msgspec.Raw(amount_text(amount).encode())


def customer_shape(customer: Customer) -> answers.Customer:
    """A customer. What this product does not know (billing, avatars) is null."""
    return answers.Customer(
        id=customer.id,
        created_at=customer.created_at,
        modified_at=customer.modified_at,
        metadata=customer.metadata,
        external_id=customer.external_id,
        email=customer.email or (None if customer.type == TEAM else ""),
        type=customer.type,
        name=customer.name,
        organization_id=customer.organization_id,
        deleted_at=customer.deleted_at,
    )


def portal_customer_shape(customer: Customer) -> answers.PortalCustomer:
    """A customer as they see themselves, without what the organization keeps about them and calls them."""
    shape = msgspec.structs.asdict(customer_shape(customer))
    shown = answers.PortalCustomer.__struct_fields__
    return answers.PortalCustomer(**{name: value for name, value in shape.items() if name in shown})


def customer_meter_shape(one: CustomerMeter) -> answers.CustomerMeter:
    """A customer meter, with the customer and the meter whole."""
    return answers.CustomerMeter(
        id=one.id,
        created_at=one.created_at,
        modified_at=one.modified_at,
        customer_id=one.customer.id,
        meter_id=one.meter.id,
        consumed_units=number(one.consumed),
        credited_units=number(one.credited),
        balance=number(one.balance),
        customer=customer_shape(one.customer),
        meter=_encoded(one.meter),
    )


def meter_shape(meter: Meter) -> answers.Meter:
    """A meter."""
    return answers.Meter(**meter_json(meter))


def entry_shape(entry: Entry) -> answers.LedgerEntry:
    """A movement of a balance. ``units`` is what the balance changed by, ``stated_units`` what a credit said."""
    usage = entry.usage
    return answers.LedgerEntry(
        id=entry.id,
        at=entry.at,
        cause=entry.cause,
        units=number(entry.units),
        balance=number(entry.balance),
        stated_units=None if entry.stated is None else number(entry.stated),
        rollover=entry.rollover,
        reference=entry.reference,
        events=usage.count if usage else None,
        arrived_from=usage.arrived_from if usage else None,
        arrived_until=usage.arrived_until if usage else None,
    )


def credit_shape(credit: Credit | CreditGranted, customer_id: str, meter_id: str) -> answers.Credit:
    """Units that came, or went where they are negative."""
    return answers.Credit(
        id=credit.id,
        at=credit.at,
        customer_id=customer_id,
        meter_id=meter_id,
        units=number(credit.units),
        rollover=credit.rollover,
        cause=credit.cause,
        reference=credit.reference,
    )


def reset_shape(reset: MeterReset) -> answers.Reset:
    """Where a customer's meters begin anew, and what of their credits goes on."""
    return answers.Reset(
        id=reset.id,
        at=reset.at,
        customer_id=reset.customer_id,
        meter_ids=reset.meter_ids,
        rollover={meter_id: number(units) for meter_id, units in reset.rollover.items()},
    )


def price_shape(meter_id: str, price: Price) -> answers.Price:
    """A price; the unit amount is a string, so that no client bends its digits."""
    return answers.Price(meter_id, amount_text(price.unit_amount), price.cap_amount, price.currency)


_texts: dict[str, tuple[Meter, msgspec.Raw]] = {}  # by the meter's id


def _encoded(meter: Meter) -> msgspec.Raw:
    """The meter's shape as JSON, made once for each state of a meter: lists of balances repeat it in every item."""
    held = _texts.get(meter.id)
    if held is None or held[0] is not meter:
        held = _texts[meter.id] = meter, msgspec.Raw(exact.encode(meter_shape(meter)))
    return held[1]


def event_shape(
    event: StoredEvent, organization_id: str, catalogue: Catalogue, children: int, sums: Mapping[str, Decimal]
) -> answers.Event:
    """An event. ``sums`` are written over its metadata, under their dotted paths."""
    customer_id = event.who if event.kind == "customer" else None
    external_id = event.who if event.kind == "external" else None
    customer = _customer(catalogue, organization_id, customer_id, external_id)
    return answers.Event(
        id=event_id(event.id_hi, event.id_lo),
        timestamp=event.timestamp,
        organization_id=organization_id,
        customer_id=customer_id,
        customer=customer_shape(customer) if customer else None,
        external_customer_id=external_id,
        member_id=event.member_id,
        external_member_id=event.external_member_id,
        child_count=children,
        parent_id=event_id(*event.parent) if event.parent else None,
        label=event.name,
        source=event.source,
        name=event.name,
        metadata=metadata_shape(event.metadata, sums),
    )


def _customer(
    catalogue: Catalogue, organization_id: str, customer_id: str | None, external_id: str | None
) -> Customer | None:
    if customer_id is not None:
        return catalogue.customer(organization_id, customer_id)
    return catalogue.customer_by_external_id(organization_id, external_id) if external_id is not None else None


def metadata_shape(text: str, sums: Mapping[str, Decimal]) -> msgspec.Raw:
    """An event's metadata, mostly the text that is stored."""
    if not sums and '"_cost"' not in text and '"_llm"' not in text and "\\u005f" not in text.lower():
        return msgspec.Raw(text.encode())
    stored = _fields(text.encode())
    fields: Json = {**stored}
    for key in RESERVED.keys() & fields.keys():
        fields[key] = _reserved(key, bytes(stored[key]))
    for path, amount in sums.items():
        _write(fields, list(steps(path)), amount)
    return msgspec.Raw(exact.encode(fields))


def _reserved(key: str, token: bytes) -> Json:
    known, numbers = RESERVED[key]
    inner = _fields(token)
    return {
        name: _number(key, number_token(bytes(raw))) if name in numbers else raw
        for name, raw in inner.items()
        if name in known
    }


def _number(key: str, token: bytes) -> str | msgspec.Raw:
    amount = parse_amount(token)
    assert amount is not None  # or the event would not have been admitted
    return decimal_text(amount) if key == "_cost" else number(amount)


def _write(fields: Json, path: list[str], amount: Decimal) -> None:
    """Put a sum in its place, making the objects on the way; a cost needs its currency."""
    *parents, last = path
    for name in parents:
        inner = fields.get(name)
        fields[name] = inner = inner if isinstance(inner, dict) else {}
        fields = inner
    is_cost = path == ["_cost", "amount"]
    fields[last] = decimal_text(amount) if is_cost else number(amount)
    if is_cost:
        fields.setdefault("currency", "usd")


def name_shape(name: EventName) -> answers.EventName:
    """A name that events go by."""
    return answers.EventName(
        name=name.name,
        label=name.name,
        source=name.source,
        occurrences=name.occurrences,
        first_seen=name.first_seen,
        last_seen=name.last_seen,
    )


def letter_shape(letter: DeadLetter, asking: str) -> answers.DeadLetter:
    """A dead letter, for the organization that asks. ``organization_id`` is what its record named, if anything.

    ``raw`` is its line, or the beginning where it ``is_cut``; bytes that are no UTF-8 are written as \\xNN.
    """
    place = letter.log_partition, letter.log_offset, letter.line
    return answers.DeadLetter(
        id="-".join(map(str, place)),
        log_partition=letter.log_partition,
        log_offset=letter.log_offset,
        line=letter.line,
        organization_id=letter.organization_id,
        is_own=letter.organization_id == asking,
        reason=letter.reason,
        detail=letter.detail,
        raw=letter.raw.decode("utf-8", "backslashreplace"),
        is_cut=len(letter.raw) < letter.raw_bytes,
        ingested_at=letter.ingested_at,
        replayed_at=letter.replayed_at,
    )
