"""What tests of the API share: one server a module, one tenant a test."""

from collections.abc import Iterator

import pytest

from tests.support.polar.organization import Polar
from tests.support.servers.query_api import Server, Tenant, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running API; its tenants do not see each other."""
    with serving(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture
def tenant(server: Server) -> Tenant:
    """An organization with nothing in it."""
    return server.tenant()


@pytest.fixture
def polar(tenant: Tenant) -> Polar:
    """A Polar organization whose news the tenant takes."""
    return Polar(tenant)
