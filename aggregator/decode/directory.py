"""The directory: dense numbers for organizations and for the customers that events name.

Events name their customer by ``external_customer_id`` or by ``customer_id``. Both are long texts; the store, the
running totals and the queries need a small integer instead. The reader thread assigns numbers in order of first
appearance, and the batch that first uses a number also stores it. A number is never reused. A customer that is known
by both names, or joined from several, has several numbers; queries combine them when they read (contract section 1.6).
"""

from typing import NamedTuple

from meters.catalogue.catalogue import Names
from meters.event import parse_uuid4

EXTERNAL = "external"
CUSTOMER = "customer"


class Organization(NamedTuple):
    """A tenant's number, and the numbers of its customers under either identifier."""

    number: int
    id_bytes: bytes
    external: dict[str, int]
    customer: dict[str, int]


class Directory:
    """All numbers given so far. Written by the reader thread alone; lookups from other threads are safe."""

    def __init__(self) -> None:
        self.organizations: dict[str, Organization] = {}
        self.organization_ids: dict[int, str] = {}
        self.subjects_count = 0
        self._fresh_organizations: list[tuple[int, str]] = []
        self._fresh_subjects: list[tuple[int, int, str, str]] = []

    def organization(self, organization_id: str) -> Organization:
        """The tenant, numbered now if it is new. ``organization_id`` is a UUID's text."""
        known = self.organizations.get(organization_id)
        if known is None:
            known = self.restore_organization(len(self.organizations), organization_id)
            self._fresh_organizations.append((known.number, organization_id))
        return known

    def number_external(self, organization: Organization, external_customer_id: str) -> int:
        """The number of a customer that is named by ``external_customer_id``."""
        return self._number(organization.number, organization.external, EXTERNAL, external_customer_id)

    def number_customer(self, organization: Organization, customer_id: str) -> int:
        """The number of a customer that is named by ``customer_id``."""
        return self._number(organization.number, organization.customer, CUSTOMER, customer_id)

    def number_of(self, organization: Organization, text: str, *, is_external: bool) -> int:
        """The number of a customer whom an event names, given now if there is none yet."""
        if is_external:
            known = organization.external.get(text)
            return known if known is not None else self.number_external(organization, text)
        customer = parse_uuid4(text)  # upper case, braces and missing hyphens name the same customer
        customer = customer if isinstance(customer, str) else text
        known = organization.customer.get(customer)
        return known if known is not None else self.number_customer(organization, customer)

    def _number(self, organization: int, known: dict[str, int], kind: str, text: str) -> int:
        number = known[text] = self.subjects_count
        self.subjects_count += 1
        self._fresh_subjects.append((number, organization, kind, text))
        return number

    def find(self, organization_id: str, names: Names) -> list[int]:
        """The numbers under which events of these names are stored, those of external ids first."""
        organization = self.organizations.get(organization_id)
        if organization is None:
            return []
        numbers = [*map(organization.external.get, names.external_ids), *map(organization.customer.get, names.ids)]
        return [number for number in numbers if number is not None]

    def take_fresh(self) -> tuple[list[tuple[int, str]], list[tuple[int, int, str, str]]]:
        """What was numbered since the last call: rows for ``organizations`` and for ``subjects``."""
        fresh = self._fresh_organizations, self._fresh_subjects
        self._fresh_organizations, self._fresh_subjects = [], []
        return fresh

    def restore_organization(self, number: int, organization_id: str) -> Organization:
        """Take over a number from the store."""
        organization = Organization(number, _id_bytes(organization_id), {}, {})
        self.organizations[organization_id] = organization
        self.organization_ids[number] = organization_id
        return organization

    def restore_subject(self, number: int, organization: Organization, kind: str, text: str) -> None:
        """Take over a number from the store."""
        (organization.external if kind == EXTERNAL else organization.customer)[text] = number
        self.subjects_count = max(self.subjects_count, number + 1)


def _id_bytes(organization_id: str) -> bytes:
    return bytes.fromhex(organization_id.replace("-", ""))
