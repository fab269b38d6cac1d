"""No question and no body may cost much more than it is worth: what is too much is refused, and briefly."""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from aggregator.api.requests import ECHO_LENGTH_MAX, IDENTIFIERS_MAX, METADATA_KEYS_MAX
from aggregator.service.errors import QUERIES_OF_ONE_AT_ONCE, TooLong
from aggregator.service.service import Patience, Waits
from meters.errors import COMPLAINTS_MAX
from tests.support.records import line
from tests.support.servers.query_api import Server, Tenant

DAY = {"start_timestamp": "2026-02-01T00:00:00Z", "end_timestamp": "2026-02-02T00:00:00Z", "interval": "day"}


def keys(count: int) -> dict[str, Any]:
    """So many different keys of metadata, a value each."""
    return {f"metadata[k{number}]": "v" for number in range(count)}


@pytest.mark.parametrize("path", ["/v1/events/", "/v1/meters/", "/v1/customers/", "/v1/benefits/", "quantities"])
def test_a_question_names_few_keys_of_metadata(tenant: Tenant, path: str) -> None:
    """Fifty are planned and read; one more is refused at once, and a thousand values of one key are still taken."""
    asked: dict[str, Any] = {}
    if path == "quantities":
        path, asked = f"/v1/meters/{tenant.meter()}/quantities", DAY
    refusal = tenant.refusal("GET", path, params=asked | keys(METADATA_KEYS_MAX + 1))
    assert refusal == (422, "RequestValidationError", [("too_long", ["query", "metadata"])])
    assert tenant.ask("GET", path, params=asked | keys(METADATA_KEYS_MAX)).status_code == 200
    values = {"metadata[k]": [str(number) for number in range(IDENTIFIERS_MAX)]}
    assert tenant.ask("GET", path, params=asked | values).status_code == 200


def filter_of(clauses: list[Any]) -> dict[str, Any]:
    """A filter of all of these."""
    return {"conjunction": "and", "clauses": clauses}


def unfinished_filter() -> dict[str, Any]:
    """Eighteen levels without their conjunction, around a long text."""
    found: dict[str, Any] = {"clauses": [{"property": "p", "operator": "eq", "value": "x" * 200_000}]}
    for _ in range(18):
        found = {"clauses": [found]}
    return found


METER: dict[str, Any] = {"name": "Tokens", "filter": filter_of([]), "aggregation": {"func": "count"}}
MISTAKES = [
    ("/v1/meters/", METER | {"filter": filter_of([filter_of([filter_of([{}] * 100)] * 100)] * 10)}),
    ("/v1/meters/preview", METER | {"filter": filter_of([filter_of([{}] * 100)] * 50)}),
    ("/v1/meters/preview", METER | {"filter": unfinished_filter()}),
    ("/v1/meters/", METER | {"metadata": {str(number): [] for number in range(100_000)}}),
    ("/v1/customers/", {"email": "a@b", "metadata": {str(number): [] for number in range(100_000)}}),
    ("/v1/customers/", {"name": "x" * 1_000_000}),
]


@pytest.mark.parametrize(("path", "body"), MISTAKES, ids=range(len(MISTAKES)))
def test_however_much_is_wrong_the_answer_is_short(tenant: Tenant, path: str, body: Any) -> None:
    """A hundred complaints at the most, and no long input among them: whoever sent it has it."""
    answer = tenant.ask("POST", path, content=json.dumps(body, separators=(",", ":")))
    assert answer.status_code == 422
    details = answer.json()["detail"]
    assert 1 <= len(details) <= COMPLAINTS_MAX
    assert max(len(str(entry["input"])) for entry in details) <= 4 * ECHO_LENGTH_MAX
    assert len(answer.content) < COMPLAINTS_MAX * ECHO_LENGTH_MAX


LONG_LISTS = [
    ("/v1/customer-meters/", {"sorting": "-consumed_units"}),
    ("/v1/customers/", {"query": "example"}),
    ("/v1/events/", {"query": "example"}),
]


@pytest.fixture
def everything_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """No list is so short that it is made while everybody waits."""
    monkeypatch.setattr("aggregator.api.customer_meters.PAIRS_AT_ONCE", 0)
    monkeypatch.setattr("aggregator.api.customers.CUSTOMERS_AT_ONCE", 1)


def make_list_long(tenant: Tenant) -> None:
    """Two customers, and usage of one."""
    tenant.meter()
    ids = [tenant.customer(external_id=name) for name in ("ann", "bob")]
    tenant.send(line("e", external_customer_id="ann"), line("f", external_customer_id=None, customer_id=ids[1]))


@pytest.mark.usefixtures("everything_is_long")
@pytest.mark.parametrize(("path", "asked"), LONG_LISTS)
def test_a_long_list_of_memory_waits_its_turn(
    server: Server, tenant: Tenant, path: str, asked: dict[str, str]
) -> None:  # fmt: skip
    """So that no more of them are made at once than questions are answered; what is short goes on."""
    make_list_long(tenant)
    gate, desk = threading.Event(), server.app.state.desk
    headers = {"Authorization": f"Bearer {tenant.secret}"}
    token = next(one for one in server.aggregator.catalogue.tokens.values() if one.organization_id == tenant.id)

    async def crowd() -> list[int]:
        held = [asyncio.create_task(desk.look(token, lambda _: gate.wait(20))) for _ in range(QUERIES_OF_ONE_AT_ONCE)]
        asking = asyncio.create_task(server.http.get(path, params=asked, headers=headers))
        while desk._asking.waits.now < 1:  # noqa: ASYNC110 - nothing tells when a request stands in line
            await asyncio.sleep(0)
        short = await server.http.get("/v1/meters/", headers=headers)
        assert not asking.done()
        gate.set()
        await asyncio.gather(*held)
        return [short.status_code, (await asking).status_code]

    assert server.run(crowd()) == [200, 200]


@pytest.mark.usefixtures("everything_is_long")
@pytest.mark.parametrize(("path", "asked"), LONG_LISTS)
def test_a_long_list_of_memory_is_given_up(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch, path: str, asked: dict[str, str]
) -> None:
    """When its time is up, like a question to the store: 504, and the thread is free again."""
    make_list_long(tenant)
    each: Callable[..., Any] = Patience.each

    def late(patience: Patience, things: Any) -> Any:
        while not patience.is_over:
            pass
        return each(patience, things)

    monkeypatch.setattr("aggregator.service.service.QUERY_S_MAX", 0.05)
    monkeypatch.setattr(Patience, "each", late)
    answer = tenant.ask("GET", path, params=asked)
    assert (answer.status_code, answer.json()["error"]) == (504, "QueryTimeout")


def test_patience_ends_in_the_middle() -> None:
    """What is gone through one by one is left where it is."""
    patience = Patience()
    things = patience.each(range(10))
    assert [next(things) for _ in range(3)] == [0, 1, 2]
    patience.is_over = True
    with pytest.raises(TooLong):
        next(things)


@pytest.mark.parametrize("sorting", ["created_at", "-created_at", "email", "-email", "name", "-name"])
def test_a_long_list_of_customers_is_like_a_short_one(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch, sorting: str
) -> None:
    """Sorted in parts or at once, page by page, and with nothing behind the last."""
    for n in (3, 1, 4, 2, 5):
        tenant.customer(name=f"n{n % 3}", email=f"e{n}@example.com")

    def pages() -> list[list[str]]:
        asked = [tenant.get("/v1/customers/", sorting=sorting, limit=2, page=page) for page in (1, 2, 3, 10**20)]
        assert {page["pagination"]["total_count"] for page in asked} == {5}
        return [[item["id"] for item in page["items"]] for page in asked]

    short = pages()
    monkeypatch.setattr("aggregator.api.customers.CUSTOMERS_AT_ONCE", 2)
    assert pages() == short
    assert [len(page) for page in short] == [2, 2, 1, 0]


def test_few_wait_for_a_position_and_fewer_of_one_organization(
    server: Server, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes then is told to come back, and others may wait; whoever does not wait is answered."""
    waits, other = Waits(3, 2), server.tenant()
    monkeypatch.setattr(server.app.state.desk, "waits", waits)

    async def ask(who: Tenant, position: str = "0:999999999") -> int:
        headers = {"Authorization": f"Bearer {who.secret}", "Prefer": "wait=30", "Log-Position": position}
        return (await server.http.get("/v1/meters/", headers=headers)).status_code

    async def waiting(*whose: Tenant) -> list["asyncio.Task[int]"]:
        tasks = [asyncio.create_task(ask(who)) for who in whose]
        count = waits._waiting.total() + len(tasks)
        while waits._waiting.total() < count:  # noqa: ASYNC110 - nothing tells when a request waits
            await asyncio.sleep(0)
        return tasks

    async def crowd() -> list[int]:
        tasks = await waiting(tenant, tenant)
        found = [await ask(tenant), await ask(tenant, "0:0")]
        tasks += await waiting(other)
        found += [await ask(other), await ask(other, "0:0")]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return found

    assert server.run(crowd()) == [503, 200, 503, 200]
    assert waits._waiting == {}
