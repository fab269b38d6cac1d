"""Find the causes of webhooks in a batch: customers whose usage or credits changed, and thresholds that were reached.

``causes`` takes the batch's new events and decisions and returns rows for the store's table ``webhook_causes``. The
rows are written in the transaction of the change itself, so no change is lost and no rolled-back change is reported.
A cause names only the customer; the sender builds the message later, from the state of that moment. Organizations
without webhook endpoints produce no causes.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from aggregator.decode.directory import Directory
from aggregator.store.webhook_outbox import Cause
from meters.catalogue.catalogue import (
    Catalogue,
    Change,
    CustomerCreated,
    CustomerDeleted,
    CustomerUpdated,
    MeterCreated,
    MeterUpdated,
)
from meters.ledger.benefits import GrantSet, SubscriptionSet
from meters.ledger.joined import CustomersJoined
from meters.ledger.ledger import CreditGranted, MeterReset, MovementWithdrawn
from meters.log import Record, parse_position
from meters.timestamps import instant_of
from meters.webhooks import EndpointSet, Heard, ThresholdReached, ThresholdSet

SCHEMA = pa.schema(
    {
        "organization_id": pa.string(),
        "subject": pa.int32(),
        "customer_id": pa.string(),
        "change": pa.string(),
        "caused_at": pa.timestamp("us"),
    }
)
Decided = tuple[Record, Change]


class Review(msgspec.Struct, frozen=True, kw_only=True, tag="review"):
    """Customers are to be looked at again whom a decision may have moved. It is the ``change`` of a cause.

    Of a meter, or only the customer ``customer_id`` of it; ``is_changed``: also those who were told of it before.
    Or of an endpoint that was disabled ``since`` a time. ``has_states``: states may differ, and not thresholds alone.
    """

    meter_id: str | None = None
    customer_id: str | None = None
    is_changed: bool = False
    endpoint_id: str | None = None
    since: datetime | None = None
    has_states: bool = True


def review_of(cause: Cause) -> Review | None:
    """The review that a cause asks for, or None."""
    if cause.customer_id is not None or cause.change is None:
        return None
    return msgspec.json.decode(cause.change, type=Review)


def causes(rows: pa.Table, decided: Iterable[Decided], catalogue: Catalogue, directory: Directory) -> pa.Table | None:
    """The causes in a round's new events and decisions; None where nobody listens to any of them.

    Who listens is taken from the end of the round: a store that is made anew reads endpoints together with what has yet
    to be told to them. What all of an organization's endpoints were told already, which it reads again, causes nothing.
    """
    decided = list(decided)
    listening = catalogue.webhooks.listening_after(change for _, change in decided)
    if not listening:
        return None
    parts = [_by_decision(decided, catalogue, listening)]
    for organization_id, heard in listening.items():
        organization = directory.organizations.get(organization_id)
        if rows.num_rows and organization is not None:
            ours = rows.filter(pc.equal(rows["organization"], organization.number))
            parts.append(_by_usage(ours, organization_id, [parse_position(one.events) or {} for one in heard]))
    found = pa.concat_tables(parts)
    return found if found.num_rows else None


def _by_usage(rows: pa.Table, organization_id: str, heard: Sequence[Mapping[int, int]]) -> pa.Table:
    """Whose usage came, once for each."""
    fresh = pc.is_valid(rows["subject"])
    for partition in set().union(*heard):
        told = min(positions.get(partition, 0) for positions in heard)
        old = pc.and_(pc.equal(rows["log_partition"], partition), pc.less(rows["log_offset"], told))
        fresh = pc.and_(fresh, pc.invert(old))
    moved = rows.select(["subject", "ingested_at"]).filter(fresh)
    moved = moved.group_by("subject").aggregate([("ingested_at", "max")])
    nothing = pa.nulls(moved.num_rows, pa.string())
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "organization_id": pa.array([organization_id] * moved.num_rows, pa.string()),
        "subject": moved["subject"].cast(pa.int32()),
        "customer_id": nothing,
        "change": nothing,
        "caused_at": moved["ingested_at_max"].cast(pa.timestamp("us")),
    }
    return pa.table(columns, schema=SCHEMA)


def _by_decision(
    decided: Sequence[Decided], catalogue: Catalogue, listening: Mapping[str, Sequence[Heard]]
) -> pa.Table:
    made = {change.customer.id: change.customer for _, change in decided if isinstance(change, CustomerCreated)}
    found: list[tuple[str, None, str | None, str | None, datetime]] = []
    disabled = {id: one.disabled_at for id, one in list(catalogue.webhooks.endpoints.items())}
    for record, change in decided:
        at = instant_of(record.timestamp_us).replace(tzinfo=None)
        review = _review(change, disabled)
        if review is not None:
            organization_id, what = review
            if any(record.offset >= one.control for one in listening.get(organization_id, ())):
                found.append((organization_id, None, None, msgspec.json.encode(what).decode(), at))
            continue
        for customer_id in _customers(change):
            customer = catalogue.customers.get(customer_id) or made.get(customer_id)
            heard = listening.get(customer.organization_id, ()) if customer else ()
            if customer is None or all(record.offset < one.control for one in heard):  # or nobody listens
                continue
            text = msgspec.json.encode(change).decode() if isinstance(change, ThresholdReached) else None
            found.append((customer.organization_id, None, customer_id, text, at))
    columns = zip(*found, strict=True) if found else [[] for _ in SCHEMA]
    arrays = [pa.array(list(column), field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.table(arrays, schema=SCHEMA)


def _review(change: Change, disabled: dict[str, datetime | None]) -> tuple[str, Review] | None:
    """The organization, and what is to be looked at in it. ``disabled`` is since when endpoints are, as of now."""
    match change:
        case MeterCreated(meter):
            return meter.organization_id, Review(meter_id=meter.id)
        case MeterUpdated(meter):
            return meter.organization_id, Review(meter_id=meter.id, is_changed=True)
        case ThresholdSet(threshold) if threshold.deleted_at is None:
            return threshold.organization_id, Review(
                meter_id=threshold.meter_id, customer_id=threshold.customer_id, has_states=False
            )  # fmt: skip
        case EndpointSet(endpoint):
            since, disabled[endpoint.id] = disabled.get(endpoint.id), endpoint.disabled_at
            if since is not None and endpoint.disabled_at is None and endpoint.deleted_at is None:
                return endpoint.organization_id, Review(endpoint_id=endpoint.id, since=since)
    return None


def _customers(change: Change) -> Sequence[str]:
    match change:
        case CustomerCreated(customer) | CustomerUpdated(customer):
            return (customer.id,)
        case CustomerDeleted(id):
            return (id,)
        case CustomersJoined(id=id, into=into):
            return (id, into)
        case CreditGranted(customer_id=id) | MeterReset(customer_id=id) | MovementWithdrawn(customer_id=id):
            return (id,)
        case ThresholdReached(customer_id=id):
            return (id,)
        case GrantSet(grant):
            return (grant.customer_id,)
        case SubscriptionSet(subscription):
            return (subscription.customer_id,)
    return ()
