"""Make the log entries of a request: one for each partition that its lines belong to.

``Spread.entries`` looks up the partition of each line's customer. With one partition nothing is looked up. Lines that
the compiled loops read come with their partitions (``ingest.admission.kernels``). For the other lines the customer is
the one that validation parsed, or is read from all lines in one call. A customer's partition is remembered, because
Kafka's hash is the most expensive step for an event in Python.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import Raw

from ingest.admission.validate import Admitted, Plain
from meters.catalogue.catalogue import Catalogue
from meters.event import parse_uuid4
from meters.log import CustomerPartitions, Entry, partition_key

if TYPE_CHECKING:
    from ingest.admission.kernels import Found

REMEMBERED_MAX = 200_000
"""Customers whose partition is kept, some 30 MB in each of the two threads that spread; whoever has more pays for the
hash now and then."""

REMEMBERED_LENGTH_MAX = 200
"""Characters of a customer's id that is remembered; the wire knows no limit."""


NULL = Raw(b"null")


class _Who(msgspec.Struct, gc=False):
    """Of any types: admission has judged the ones that count, and lets the other pass as it is."""

    external_customer_id: Raw = NULL
    customer_id: Raw = NULL


class _Named(NamedTuple):
    external_customer_id: str | None
    customer_id: str | None


_decode_lines = msgspec.json.Decoder(_Who).decode_lines


class Spread:
    """Makes entries of what was admitted. For one thread."""

    def __init__(self) -> None:
        self._partitions = 0
        self._remembered = 0
        self._known: dict[str, dict[str | None, int]] = {}  # by organization and external customer
        self._hashes: dict[str, CustomerPartitions] = {}  # by organization

    def entries(
        self, admitted: Admitted, organization_id: str, catalogue: Catalogue, partitions: int
    ) -> list[Entry]:
        """The records to append, at most one for a partition."""
        if admitted.compiled is not None:
            return entries_of(admitted.compiled, organization_id, partitions)[0]
        if partitions == 1:
            return [_entry(admitted.value, 0, organization_id, admitted.distinct_keys)]
        if partitions != self._partitions or self._remembered > REMEMBERED_MAX:
            self._partitions, self._remembered, self._known, self._hashes = partitions, 0, {}, {}
        places = self._places(_whos(admitted), organization_id, catalogue)
        if len(set(places)) == 1:
            return [_entry(admitted.value, places[0], organization_id, admitted.distinct_keys)]
        lines: dict[int, list[bytes]] = {}
        for place, line in zip(places, admitted.lines, strict=True):
            lines.setdefault(place, []).append(line)
        values = {place: b"\n".join(lines[place]) for place in sorted(lines)}
        return [_entry(value, place, organization_id, admitted.distinct_keys) for place, value in values.items()]

    def _places(self, whos: Sequence[_Named | Plain], organization_id: str, catalogue: Catalogue) -> list[int]:
        known = self._known.setdefault(organization_id, {})
        places = [known.get(who.external_customer_id) for who in whos]
        if None in places:
            for row, who in enumerate(whos):
                if places[row] is None:
                    places[row] = self._place(who, organization_id, catalogue, known)
        return places  # type: ignore[return-value]  # every None was replaced

    def _place(
        self, who: _Named | Plain, organization_id: str, catalogue: Catalogue, known: dict[str | None, int]
    ) -> int:
        name = who.external_customer_id
        if name is None:  # not remembered: a customer may be given a name later
            id = parse_uuid4(who.customer_id)
            customer = catalogue.customer(organization_id, id) if isinstance(id, str) else None
            return self._hash(organization_id).of((customer and customer.external_id) or str(id))
        place = self._hash(organization_id).of(name)
        if len(name) <= REMEMBERED_LENGTH_MAX:
            known[name] = place
            self._remembered += 1
        return place

    def _hash(self, organization_id: str) -> CustomerPartitions:
        found = self._hashes.get(organization_id)
        if found is None:
            found = self._hashes[organization_id] = CustomerPartitions(organization_id, self._partitions)
        return found


def entries_of(found: "Found", organization_id: str, partitions: int) -> tuple[list[Entry], list[int]]:
    """The records of what compiled loops read, and for each body the sum of ``1 << partition`` of its lines.

    Of more than 64 partitions such a sum says nothing.
    """
    if partitions == 1:
        return [_entry(found.value, 0, organization_id, True)], [1] * len(found.rows)
    parts, masks = found.spread(partition_key(organization_id, ""), partitions)
    return [_entry(value, place, organization_id, True) for place, value in parts], masks


def _whos(admitted: Admitted) -> Sequence[_Named | Plain]:
    if admitted.plains is not None:
        return admitted.plains
    return [_Named(_text(who.external_customer_id), _text(who.customer_id)) for who in _decode_lines(admitted.value)]


def _text(raw: Raw) -> str | None:
    return msgspec.json.decode(raw, type=str) if bytes(raw).startswith(b'"') else None


def _entry(value: bytes, partition: int, organization_id: str, distinct_keys: bool) -> Entry:
    return Entry(value, partition, organization_id, admitted=True, distinct_keys=distinct_keys)
