"""Customers that turn out to be one: the decision ``CustomersJoined``, and which ids name which customer after it.

The catalogue, the ledger and the benefits fold the decision with ``Joined``, so all three agree about an id.
"""

from datetime import datetime

import msgspec


class CustomersJoined(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="customers.joined"):
    """Two ids turn out to be one customer: ``id`` names the customer ``into`` from now on.

    Everything of a customer ``id`` belongs to ``into``: usage under each of its names, credits, resets, grants and
    subscriptions, as if there had always been one customer. Usage that resets state was counted of one of the two, so
    it is not known any more after this, and is counted again. Where both ids are the same, the id names no other
    customer any more: the other one was deleted, and there is a new customer of this id.
    """

    organization_id: str
    id: str
    into: str
    at: datetime


class Joined:
    """Which ids name another customer, folded from ``CustomersJoined``. Ids of different organizations do not meet."""

    def __init__(self) -> None:
        self._into: dict[tuple[str, str], str] = {}
        self._others: dict[tuple[str, str], tuple[str, ...]] = {}  # the inverse

    def join(self, change: CustomersJoined) -> str | None:
        """Take in one decision and return the id of the customer; None where the decision says nothing new."""
        organization_id, id = change.organization_id, change.id
        if id == change.into:
            self._part(organization_id, id)
            return None
        into = self.customer_of(organization_id, change.into)
        if id in (into, *self.others(organization_id, into)):
            return None
        ids = (*self.others(organization_id, id), id)
        self._part(organization_id, id)
        self._others.pop((organization_id, id), None)
        self._others[organization_id, into] = (*self.others(organization_id, into), *ids)
        self._into.update(((organization_id, one), into) for one in ids)
        return into

    def _part(self, organization_id: str, id: str) -> None:
        into = self._into.pop((organization_id, id), None)
        if into is not None:
            self._others[organization_id, into] = tuple(one for one in self.others(organization_id, into) if one != id)

    def customer_of(self, organization_id: str, id: str) -> str:
        """Return the id of the customer that ``id`` names."""
        return self._into.get((organization_id, id), id)

    def others(self, organization_id: str, id: str) -> tuple[str, ...]:
        """Return the further ids that name a customer."""
        return self._others.get((organization_id, id), ())
