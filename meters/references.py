"""Whether what an event names exists: its organization, its customer, its member.

This is asked after the event itself was found good, and by whoever holds the catalogue. The gateway takes the tokens of
organizations alone, so an event that names one is refused there; that each event names its own, as with the tokens of
Polar's users, occurs in the conformance cases only. External customer ids are not asked about: usage may come before
the customer, and is theirs once an operator says who they are.
"""

from meters.catalogue import Catalogue
from meters.event import Event
from meters.refusal import Reason, Refusal


def reference_refusals(
    event: Event, catalogue: Catalogue, *, token_organization_id: str | None, index: int = 0
) -> list[Refusal]:
    """The names in an event that mean nothing.

    ``token_organization_id`` is the organization whose token sent the event, and None where each event names its own.
    """
    refusals = _organization_refusals(event, catalogue, token_organization_id, index)
    organization_id = token_organization_id or event.organization_id or ""
    if event.customer_id is not None and catalogue.customer(organization_id, event.customer_id) is None:
        refusals.append(Reason.CUSTOMER_UNKNOWN.at(index, "customer_id", input=event.customer_id))
    if event.member_id is not None:  # there are no members yet, so no id can be one
        refusals.append(Reason.MEMBER_UNKNOWN.at(index, "member_id", input=event.member_id))
    return refusals


def _organization_refusals(
    event: Event, catalogue: Catalogue, token_organization_id: str | None, index: int
) -> list[Refusal]:
    named = event.organization_id
    if token_organization_id is not None:
        return [] if named is None else [Reason.ORGANIZATION_TOKEN.at(index, "organization_id", input=named)]
    if named is None:
        return [Reason.ORGANIZATION_MISSING.at(index, "organization_id")]
    known = named in catalogue.organizations
    return [] if known else [Reason.ORGANIZATION_UNKNOWN.at(index, "organization_id", input=named)]
