"""Each answer is of one definition of a meter, and of the snapshot whose position it states."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from msgspec.structs import replace

from aggregator.totals.running import RunningTotals
from aggregator.view import Snapshot
from meters.aggregation import Aggregation
from meters.catalogue.catalogue import MeterUpdated, Names, encode_change
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, parse_position
from tests.support.records import entry, line
from tests.support.servers.query_api import Tenant
from tests.support.waiting import PATIENCE_S, eventually

DAY = {"start_timestamp": "2026-03-01T00:00:00Z", "end_timestamp": "2026-03-01T23:00:00Z", "interval": "day"}
ANN: dict[str, Any] = {"external_customer_id": "ann"}
SUM, MEAN = Aggregation("sum", "a"), Aggregation("avg", "b")
BY_DEFINITION = {("sum", "a"): 3, ("avg", "b"): 1000}  # of three events with a = 1 and b = 1000


@contextmanager
def half_changed(tenant: Tenant, meter: str) -> Iterator[None]:
    """The meter becomes a mean of ``b``: the catalogue has it, and the writer's thread stands before the totals."""
    view, change = tenant.server.aggregator, RunningTotals.changed
    is_there, goes_on = threading.Event(), threading.Event()

    def stand(*arguments: Any) -> None:
        is_there.set()
        assert goes_on.wait(PATIENCE_S)
        change(*arguments)

    changed = replace(view.catalogue.meters[meter], aggregation=MEAN)
    with patch.object(RunningTotals, "changed", stand):
        value = encode_change(MeterUpdated(changed))
        [offset] = tenant.server.run(tenant.server.log.append(USAGE_CONTROL, [Entry(value, admitted=True)]))
        assert is_there.wait(PATIENCE_S)
        try:
            yield
        finally:
            goes_on.set()
            eventually(lambda: view.control_position > offset)


def test_an_answer_is_of_one_definition_while_a_meter_is_changed(tenant: Tenant) -> None:
    """Balances, lists, totals and series: each shows a definition with its own number."""
    meter, customer = tenant.meter(func="sum", property="a"), tenant.customer(external_id="ann")
    tenant.send(*[line(f"{tenant.id} {number}", metadata={"a": 1, "b": 1000}) for number in range(3)])
    view = tenant.server.aggregator
    before, numbers = view.catalogue.meters[meter], view.directory.find(tenant.id, Names((customer,), ("ann",)))
    assert before.aggregation == SUM
    [first] = tenant.get("/v1/customer-meters/")["items"]
    assert first["consumed_units"] == 3

    def check() -> None:
        [listed] = tenant.get("/v1/customer-meters/")["items"]
        [ordered] = tenant.get("/v1/customer-meters/", sorting="balance")["items"]
        for row in (listed, ordered, tenant.get(f"/v1/customer-meters/{first['id']}")):
            shown = row["meter"]["aggregation"]
            assert row["consumed_units"] == BY_DEFINITION[shown["func"], shown["property"]]
        assert tenant.get(f"/v1/meters/{meter}/quantities", **DAY)["total"] in BY_DEFINITION.values()
        assert tenant.get(f"/v1/meters/{meter}/quantities", **DAY, **ANN)["total"] in BY_DEFINITION.values()
        assert int(tenant.get(f"/v1/meters/{meter}/usage", **ANN)["value"]) in BY_DEFINITION.values()
        [state] = tenant.get(f"/v1/customers/{customer}/state")["active_meters"]
        assert state["consumed_units"] in BY_DEFINITION.values()

    with half_changed(tenant, meter):
        check()
        assert view.catalogue.meters[meter].aggregation == MEAN
        assert view.totals.total(view.catalogue.meters[meter], numbers) is None
    check()
    eventually(lambda: view.totals.total(view.catalogue.meters[meter], numbers) is not None)
    assert view.totals.total(before, numbers) is None, "who still holds the definition before asks the store"
    assert tenant.get(f"/v1/customer-meters/{first['id']}")["consumed_units"] == 1000


def ledger(tenant: Tenant, meter: str) -> int:
    """Units of all entries of the customer's ledger."""
    [row] = tenant.get("/v1/customer-meters/")["items"]
    return -sum(entry["units"] for entry in tenant.get(f"/v1/customer-meters/{row['id']}/ledger")["items"])


@pytest.mark.parametrize(
    "counted",
    [
        lambda tenant, meter: tenant.ask("GET", f"/v1/meters/{meter}/quantities", params=DAY | ANN).json()["total"],
        lambda tenant, meter: tenant.ask("GET", f"/v1/meters/{meter}/usage", params=ANN).json()["count"],
        lambda tenant, meter: tenant.ask("GET", "/v1/events/", params=ANN).json()["pagination"]["total_count"],
        lambda tenant, meter: tenant.ask("GET", "/v1/events/names", params=ANN).json()["pagination"]["total_count"],
        ledger,
    ],
    ids=["quantities", "usage", "events", "names", "ledger"],
)
def test_a_question_sees_the_first_event_that_is_counted_while_it_waits(
    tenant: Tenant, counted: Callable[[Tenant, str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The customer's numbers are looked up in the snapshot that the question is answered from."""
    meter, customer = tenant.meter(), tenant.customer(external_id="ann")
    if counted is ledger:  # which is there once there is a movement
        tenant.post(f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
    monkeypatch.setattr(RunningTotals, "total", lambda *_: None)  # as while the meter is counted
    view, written = tenant.server.aggregator, list[int]()
    read = view.read

    def write_first() -> None:
        record = entry(line(f"{tenant.id} first"), organization_id=tenant.id)
        written.extend(asyncio.run(tenant.server.log.append(USAGE_EVENTS, [record])))

    @contextmanager
    def later() -> Iterator[Snapshot]:
        if not written:
            writing = threading.Thread(target=write_first)
            writing.start()
            writing.join()
            eventually(lambda: view.as_of[0] > written[0])
        with read() as snapshot:
            yield snapshot

    monkeypatch.setattr(view, "read", later)
    assert counted(tenant, meter) == 1
    answered = tenant.ask("GET", f"/v1/meters/{meter}/quantities", params=DAY | ANN)
    assert (parse_position(answered.headers["as-of"]) or {})[0] > written[0]
