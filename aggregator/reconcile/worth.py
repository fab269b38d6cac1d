"""What a difference is worth: meters' quantities, and cents where a meter has a price. Pure."""

from collections.abc import Mapping
from decimal import Decimal

from aggregator.reconcile.evidence import contributions
from meters.amount import EXACT
from meters.catalogue import Catalogue
from meters.facts import Facts
from meters.meter import Meter

Quantities = dict[str, Decimal]
"""By the meter's name."""


class Worth:
    """Meters and prices as the control stream has them."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._cents = {
            (meter.organization_id, meter.name): price.unit_amount
            for meter in catalogue.meters.values()
            if (price := catalogue.prices.of(meter.id)) is not None
        }

    def meters(self, organization_id: str) -> list[Meter]:
        """The organization's meters that are in use."""
        return [meter for meter in self._catalogue.meters_of(organization_id) if meter.archived_at is None]

    def of(self, organization_id: str, found: Facts) -> Quantities:
        """What an event adds to the organization's meters."""
        return contributions(self.meters(organization_id), found)

    def cents(self, organization_id: str, quantities: Mapping[str, Decimal]) -> Decimal | None:
        """What quantities cost by their meters' unit prices, credits and caps aside; None where no price is known."""
        priced = [(organization_id, name) for name in quantities if (organization_id, name) in self._cents]
        if not priced:
            return None
        parts = [EXACT.multiply(self._cents[key], quantities[key[1]]) for key in priced]
        return sum(parts, Decimal(0)).quantize(Decimal("0.01"))


def add(totals: Quantities, more: Mapping[str, Decimal], sign: int = 1) -> None:
    """Add quantities to others, in place."""
    for name, amount in more.items():
        totals[name] = EXACT.add(totals.get(name, Decimal(0)), amount if sign > 0 else -amount)


def between(there: Mapping[str, Decimal], here: Mapping[str, Decimal]) -> Quantities:
    """What one side has more than the other, without zeros."""
    totals = dict(there)
    add(totals, here, -1)
    return {name: amount for name, amount in totals.items() if amount}
