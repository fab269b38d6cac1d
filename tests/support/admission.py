"""What the admission tests share: a tenant, a clock that stands still, and bodies."""

import itertools
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ingest.admission.validate import Admitted, RefusedBody, Tenant, admit
from meters.catalogue.catalogue import Catalogue, Customer, CustomerCreated

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
ORGANIZATION = "7d4f3a52-1111-4b5e-9a4e-111111111111"
CUSTOMER = "11111111-1111-4111-8111-111111111111"
OTHERS_CUSTOMER = "22222222-2222-4222-8222-222222222222"
UNKNOWN = "33333333-3333-4333-8333-333333333333"

CATALOGUE = Catalogue([
    CustomerCreated(Customer(id=CUSTOMER, organization_id=ORGANIZATION, created_at=NOW)),
    CustomerCreated(Customer(id=OTHERS_CUSTOMER, organization_id=UNKNOWN, created_at=NOW)),
])  # fmt: skip


class CountedIds:
    """Makes ids that a test can name."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def make_ids(self, count: int) -> Sequence[str]:
        """So many."""
        return [f"made-{next(self._numbers)}" for _ in range(count)]


def tenant() -> Tenant:
    """An organization, whose nameless events are called made-0, made-1 and so on."""
    return Tenant(ORGANIZATION, CATALOGUE, CountedIds())


def admit_text(*events: str, lenient: bool = False) -> Admitted | RefusedBody:
    """Admit a body of events that are written out."""
    return admit(('{"events":[' + ",".join(events) + "]}").encode(), tenant(), NOW, lenient=lenient)


def admitted(*events: str, lenient: bool = False) -> Admitted:
    """Admit a body that is expected to pass."""
    found = admit_text(*events, lenient=lenient)
    assert isinstance(found, Admitted), found
    return found


def refused(body: bytes) -> RefusedBody:
    """Admit a body that is expected not to pass."""
    found = admit(body, tenant(), NOW)
    assert isinstance(found, RefusedBody), found
    return found


def written(**fields: Any) -> str:
    """A good event, with other fields on top, written compactly."""
    return json.dumps({"name": "call", "external_customer_id": "u", "external_id": "x"} | fields, separators=(",", ":"))
