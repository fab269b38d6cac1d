"""What a round gives reason to tell of: customers whose usage or credits moved, and thresholds they reached.

A cause is written in the transaction of the change itself, so nothing that is counted goes untold, and nothing is told
that did not come to count. It says only who moved; what to say of them is worked out when it is said, from what is
true then. Organizations that nobody listens to cause nothing.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aggregator.directory import Directory
from meters.benefits import GrantSet, SubscriptionSet
from meters.catalogue import Catalogue, Change, CustomerCreated, CustomerDeleted, CustomerUpdated
from meters.credit import CreditGranted, MeterReset, MovementWithdrawn
from meters.log import Record
from meters.webhooks import ThresholdReached

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SCHEMA = pa.schema(
    {
        "organization_id": pa.string(),
        "subject": pa.int32(),
        "customer_id": pa.string(),
        "change": pa.string(),
        "caused_at": pa.timestamp("us"),
    }
)
Decided = tuple[Record, Change | None]


def causes(rows: pa.Table, decided: Iterable[Decided], catalogue: Catalogue, directory: Directory) -> pa.Table | None:
    """The causes in a round's new events and decisions; None where nobody listens to any of them.

    What all of an organization's endpoints were told already (which a store made anew reads again) causes nothing.
    """
    listening = catalogue.webhooks.listening()
    if not listening:
        return None
    parts = [_by_decision(decided, catalogue, listening)]
    if rows.num_rows:
        parts.append(_by_usage(rows, directory, listening))
    found = pa.concat_tables(parts)
    return found if found.num_rows else None


def _by_usage(rows: pa.Table, directory: Directory, listening: Mapping[str, datetime]) -> pa.Table:
    numbers = {known.number: id for id in listening if (known := directory.organizations.get(id))}
    ours = rows.select(["organization", "subject", "ingested_at"])
    ours = ours.filter(pc.is_in(ours["organization"], pa.array(list(numbers), ours["organization"].type)))
    moved = ours.group_by(["organization", "subject"]).aggregate([("ingested_at", "max")])
    ids = [numbers[number] for number in moved["organization"].to_pylist()]
    told = np.array([listening[id].replace(tzinfo=None) for id in ids], "datetime64[us]")
    at = moved["ingested_at_max"].cast(pa.timestamp("us"))
    columns: dict[str, Any] = {
        "organization_id": pa.array(ids, pa.string()),
        "subject": moved["subject"].cast(pa.int32()),
        "customer_id": pa.nulls(len(ids), pa.string()),
        "change": pa.nulls(len(ids), pa.string()),
        "caused_at": at,
    }
    known = pc.and_(pc.is_valid(columns["subject"]), pc.greater(at, pa.array(told, pa.timestamp("us"))))
    return pa.table(columns, schema=SCHEMA).filter(known)


def _by_decision(decided: Iterable[Decided], catalogue: Catalogue, listening: Mapping[str, datetime]) -> pa.Table:
    found = []
    for record, change in decided:
        customer_id = _customer(change)
        customer = catalogue.customers.get(customer_id) if customer_id else None
        organization_id = customer.organization_id if customer else _organization(change)
        at = EPOCH + timedelta(microseconds=record.timestamp_us)
        if organization_id not in listening or at <= listening[organization_id]:
            continue
        text = msgspec.json.encode(change).decode() if isinstance(change, ThresholdReached) else None
        found.append((organization_id, None, customer_id, text, at.replace(tzinfo=None)))
    columns = zip(*found, strict=True) if found else [[] for _ in SCHEMA]
    arrays = [pa.array(list(column), field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.table(arrays, schema=SCHEMA)


def _customer(change: Change | None) -> str | None:
    match change:
        case CustomerCreated(customer) | CustomerUpdated(customer):
            return customer.id
        case CustomerDeleted(id):
            return id
        case CreditGranted(customer_id=id) | MeterReset(customer_id=id) | MovementWithdrawn(customer_id=id):
            return id
        case ThresholdReached(customer_id=id):
            return id
        case GrantSet(grant):
            return grant.customer_id
        case SubscriptionSet(subscription):
            return subscription.customer_id
    return None


def _organization(change: Change | None) -> str:
    """Of a customer that the catalogue does not have yet: whoever makes one says whose it is."""
    return change.customer.organization_id if isinstance(change, CustomerCreated) else ""
