"""What a difference is worth: meters' quantities, and cents where a meter has a price. Pure."""

from collections import Counter
from collections.abc import Mapping
from decimal import Decimal

from aggregator.reconcile.evidence import contributions
from meters.aggregation import exact_sum
from meters.amount import EXACT
from meters.catalogue import Catalogue
from meters.facts import Facts
from meters.meter import Meter

Quantities = dict[str, Decimal]
"""By the meter's id: several meters may have one name."""


class Worth:
    """Meters and prices as the control stream has them."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._cents = {
            id: price.unit_amount for id in catalogue.meters if (price := catalogue.prices.of(id)) is not None
        }
        meters = catalogue.meters.values()
        self._in_use = Counter((meter.organization_id, meter.name) for meter in meters if meter.archived_at is None)

    def meters(self, organization_id: str) -> list[Meter]:
        """The organization's meters that are in use."""
        return [meter for meter in self._catalogue.meters_of(organization_id) if meter.archived_at is None]

    def of(self, organization_id: str, found: Facts) -> Quantities:
        """What an event adds to the organization's meters."""
        return contributions(self.meters(organization_id), found)

    def named(self, quantities: Mapping[str, Decimal]) -> dict[str, Decimal]:
        """Quantities as a person reads them: by the meter's name, with its id where another one in use is called so."""
        return {self._name(id): amount for id, amount in quantities.items()}

    def _name(self, meter_id: str) -> str:
        meter = self._catalogue.meters.get(meter_id)
        if meter is None:
            return meter_id
        others = self._in_use[meter.organization_id, meter.name] - (meter.archived_at is None)
        return f"{meter.name} ({meter_id})" if others else meter.name

    def cents(self, quantities: Mapping[str, Decimal]) -> Decimal | None:
        """What quantities cost by their meters' unit prices, credits and caps aside; None where no price is known."""
        parts = [EXACT.multiply(self._cents[id], amount) for id, amount in quantities.items() if id in self._cents]
        if not parts:
            return None
        return exact_sum(parts).quantize(Decimal("0.01"), context=EXACT)


def add(totals: Quantities, more: Mapping[str, Decimal], sign: int = 1) -> None:
    """Add quantities to others, in place."""
    for id, amount in more.items():
        totals[id] = EXACT.add(totals.get(id, Decimal(0)), amount if sign > 0 else amount.copy_negate())


def between(there: Mapping[str, Decimal], here: Mapping[str, Decimal]) -> Quantities:
    """What one side has more than the other, without zeros."""
    totals = dict(there)
    add(totals, here, -1)
    return {id: amount for id, amount in totals.items() if amount}
