"""Dead letters that belong to no organization: the first one has them, however many others there are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from meters.catalogue.access import SCOPES
from meters.catalogue.catalogue import Organization, OrganizationCreated
from meters.log import USAGE_EVENTS
from tests.support.records import NOW, entry, line
from tests.support.servers.query_api import Server, Tenant, serving
from tests.support.waiting import PATIENCE_S

BROKEN = b'{"name": '


class Shared(NamedTuple):
    """A server with two organizations, and an id that neither has."""

    server: Server
    first: Tenant
    second: Tenant
    nobody: str

    def send(self, *organizations: str | None) -> None:
        """A broken line of a direct producer for each, in this order."""

        async def sending() -> None:
            records = [entry(BROKEN, organization_id=organization, admitted=False) for organization in organizations]
            offsets = await self.server.log.append(USAGE_EVENTS, records)
            assert await self.server.aggregator.wait_for({0: max(offsets) + 1}, PATIENCE_S)

        self.server.run(sending())


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Shared]:
    """With a letter of each kind: of nobody, of no id, of an id that nobody has, of the second, of the first."""
    with serving(tmp_path) as server:
        shared = Shared(server, server.tenant(), server.tenant(), str(uuid4()))
        shared.send(None, "acme", shared.nobody, shared.second.id, shared.first.id)
        yield shared


def ids(tenant: Tenant, **asked: Any) -> list[str]:
    """Which letters a tenant's token shows, oldest first."""
    return [letter["id"] for letter in reversed(tenant.get("/v1/dead-letters/", **asked)["items"])]


def test_what_belongs_to_no_organization_is_shown_to_the_first(shared: Shared) -> None:
    """Beside its own; each is found by its id, and taken off the list."""
    assert ids(shared.first) == ["0-0-0", "0-1-0", "0-2-0", "0-4-0"]
    found = shared.first.get("/v1/dead-letters/", limit=4)
    assert found["pagination"]["total_count"] == 4
    assert [(letter["organization_id"], letter["is_own"]) for letter in found["items"]] == [
        (shared.first.id, True), (shared.nobody, False), ("acme", False), (None, False)
    ]  # fmt: skip
    for id in ids(shared.first):
        assert shared.first.post(f"/v1/dead-letters/{id}/replay", {})["replayed_at"] == "2026-03-01T12:00:00Z"
    assert ids(shared.first) == []
    assert len(ids(shared.first, include_replayed=True)) == 4


def test_a_second_organization_sees_its_own_alone(shared: Shared) -> None:
    """What belongs to nobody may be another's in truth: it is not listed, not found by its id, and not replayed."""
    assert ids(shared.second) == ids(shared.second, include_replayed=True) == ["0-3-0"]
    for offset in (0, 1, 2, 4):
        assert shared.second.ask("GET", f"/v1/dead-letters/0-{offset}-0").status_code == 404
        assert shared.second.ask("POST", f"/v1/dead-letters/0-{offset}-0/replay").status_code == 404
    assert shared.first.ask("GET", "/v1/dead-letters/0-3-0").status_code == 404
    assert shared.first.ask("POST", "/v1/dead-letters/0-3-0/replay").status_code == 404


def test_an_organization_that_is_made_later_has_its_own(shared: Shared) -> None:
    """From the decision on they are no longer shown to the first."""
    shared.server.decide(OrganizationCreated(Organization(shared.nobody, "late", NOW)))
    late = Tenant(shared.server, shared.nobody)
    late.secret = late.token(*SCOPES)
    assert ids(late) == ["0-2-0"]
    assert ids(shared.first) == ["0-0-0", "0-1-0", "0-4-0"]


def test_a_conflict_of_events_whose_lines_name_their_organization_is_that_ones(shared: Shared) -> None:
    """The line could be read, so it is known whose it is."""

    async def sending() -> None:
        lines = [line("twice", organization_id=shared.second.id, name=name) for name in ("call", "other")]
        (offset,) = await shared.server.log.append(
            USAGE_EVENTS, [entry(*lines, organization_id=None, admitted=False)]
        )
        assert await shared.server.aggregator.wait_for({0: offset + 1}, PATIENCE_S)

    shared.server.run(sending())
    assert ids(shared.second) == ["0-3-0", "0-5-1"]
    assert "0-5-1" not in ids(shared.first)
