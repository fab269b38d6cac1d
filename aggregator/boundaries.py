"""Where customers' windows begin, handed from the ledger to the running totals.

The ledger speaks of customers, the totals of the numbers that events carry, and a customer may have two of them: one
for each name. A number may come to be a customer's long after its events (the customer is made later, or is given
another external id), so the windows follow the catalogue as well as the resets.
"""

from collections.abc import Mapping, Sequence

from aggregator.directory import CUSTOMER, EXTERNAL, Directory
from aggregator.running import RunningTotals
from aggregator.view import EVER
from aggregator.windows import window_begin_us
from meters.catalogue import Catalogue, Change, Customer, CustomerCreated, CustomerDeleted, CustomerUpdated
from meters.credit import MeterReset, MovementWithdrawn
from meters.ledger import Account, Ledger
from meters.meter import Meter

Subject = tuple[int, int, str, str]  # number, organization's number, kind, text
Named = tuple[str, str]  # kind and text: how events name a customer


class Boundaries:
    """For the writer's thread alone: note what a round decides and whom it numbers, then ``begin_windows``."""

    def __init__(self, catalogue: Catalogue, ledger: Ledger, directory: Directory) -> None:
        self._catalogue, self._ledger, self._directory = catalogue, ledger, directory
        self._touched: dict[str, dict[int, Named]] = {}  # by organization and number

    def begins(self, meter: Meter) -> Mapping[int, int]:
        """Where the windows of a meter begin, by customer number; those that are left out begin at EVER."""
        found: dict[int, int] = {}
        for customer_id, account in self._ledger.of_meter(meter.id).items():
            customer = self._catalogue.customer(meter.organization_id, customer_id)
            if account.since is not None and customer is not None:
                found.update(dict.fromkeys(self._numbers(customer), window_begin_us(account.since)))
        return found

    def note(self, change: Change) -> None:
        """Note whom a change concerns. Called before and after it is applied: names change hands."""
        match change:
            case MeterReset(customer_id=id) | MovementWithdrawn(customer_id=id) | CustomerDeleted(id=id):
                self._touch(self._catalogue.customers.get(id))
            case CustomerCreated(customer) | CustomerUpdated(customer):
                self._touch(self._catalogue.customers.get(customer.id))

    def number(self, fresh: Sequence[Subject]) -> None:
        """Note who is named by an event for the first time. Called before the event is added."""
        for number, organization, kind, text in fresh:
            organization_id = self._directory.organization_ids[organization]
            if self._owner(organization_id, (kind, text)) is not None:
                self._touched.setdefault(organization_id, {})[number] = kind, text

    def begin_windows(self, totals: RunningTotals) -> None:
        """Bring the windows of everyone noted to where they begin now."""
        touched, self._touched = self._touched, {}
        for organization_id, names in touched.items():
            owners = {number: self._owner(organization_id, name) for number, name in names.items()}
            for meter in self._catalogue.meters_of(organization_id):
                if self._ledger.has_resets(meter.id) or totals.is_windowed(meter.id):
                    accounts = self._ledger.of_meter(meter.id)
                    totals.begin_windows(meter, {number: _since(accounts, owner) for number, owner in owners.items()})

    def _touch(self, customer: Customer | None) -> None:
        if customer is not None:
            self._touched.setdefault(customer.organization_id, {}).update(self._numbers(customer))

    def _numbers(self, customer: Customer) -> dict[int, Named]:
        known = self._directory.organizations.get(customer.organization_id)
        if known is None:
            return {}
        found = {known.customer.get(customer.id): (CUSTOMER, customer.id)}
        if customer.external_id is not None:
            found[known.external.get(customer.external_id)] = (EXTERNAL, customer.external_id)
        return {number: name for number, name in found.items() if number is not None}

    def _owner(self, organization_id: str, name: Named) -> str | None:
        kind, text = name
        if kind == EXTERNAL:
            customer = self._catalogue.customer_by_external_id(organization_id, text)
        else:
            customer = self._catalogue.customer(organization_id, text)
        return customer.id if customer else None


def _since(accounts: Mapping[str, Account], customer_id: str | None) -> int:
    account = accounts.get(customer_id) if customer_id is not None else None
    return window_begin_us(account.since) if account is not None else EVER
