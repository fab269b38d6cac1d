"""One server for all cases and recorded requests; everything is sent before anything is asked."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import httpx
import pytest

from tests.conformance.cases import cases
from tests.conformance.differences import DIFFERENCES
from tests.conformance.recorded import named_things
from tests.conformance.requests import API, batches_of, customers_of, way
from tests.support.servers.multi_tenant_server import Server, Tenant

GROUPS = (
    "filter", "filter_validation", "aggregation", "quantities", "quantities_limits", "ingest", "hierarchy",
    "list_events", "metrics", "meter_update",
)  # fmt: skip
PROPERTY = "conformance"


class World(NamedTuple):
    """A running server on which every case has happened."""

    tenants: dict[str, Tenant]  # by the case's id
    answers: dict[str, list[httpx.Response]]  # to the case's ingestions
    known: Tenant  # whose are the customer and the meter that the recorded requests name
    stranger: Tenant  # who has nothing


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Everything sent, and every read waits until it is counted."""
    chosen = [case for case in cases(*GROUPS) if way(case) == API]
    tenants = {case["id"]: Tenant(case["id"], customers_of(case)) for case in chosen}
    known, stranger = Tenant("known"), Tenant("stranger")
    server = Server(
        tmp_path_factory.mktemp("conformance") / "data", [*tenants.values(), known, stranger], named_things(known)
    )
    try:
        server.start()
        answers = {
            case["id"]: [tenants[case["id"]].send(batch) for batch in batches_of(case, tenants[case["id"]])]
            for case in chosen
        }
        taken = [answer for sent in answers.values() for answer in sent if answer.is_success]
        server.settle(taken[-1].headers["log-position"])
        yield World(tenants, answers, known, stranger)
    finally:
        server.close()


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Note for the summary which case a test held, and how."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and "case" in callspec.params:
        case = callspec.params["case"]
        record_property(PROPERTY, [case["group"], way(case), case["id"] in DIFFERENCES])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line: how many cases of each group held, and how."""
    noted = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == PROPERTY and report.when == "call"
    ]
    if noted:
        groups = ", ".join(f"{group} {count}" for group, count in Counter(group for group, *_ in noted).items())
        through, differ = sum(way == API for _, way, _ in noted), sum(different for *_, different in noted)
        terminalreporter.write_line(
            f"Polar's cases: {groups}; {through} of {len(noted)} through the API, {differ} different on purpose"
        )
