"""Polar's cases of customer meters, credits, rollover and prices, over HTTP.

The API runs in this process, so that the clock can stand where a case wants it. A case's times are kept as distances:
the clock of a log goes forward only, and all cases share one.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from meters import exact
from meters.ledger.ledger import CreditGranted, MeterReset, customer_meter_id
from tests.conformance.cases import Case, agree, cases, instant, named, same_number
from tests.conformance.differences import NOT_HERE
from tests.support.records import line
from tests.support.servers.query_api import Server, serving

Json = Any


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running API; each case is a tenant of its own."""
    with serving(tmp_path_factory.mktemp("balances")) as server:
        yield server


class Told:
    """A tenant to whom a case has happened."""

    def __init__(self, server: Server, case: Case) -> None:
        self.server, self.tenant = server, server.tenant()
        self.case = case
        given = case["given"]["meter"]
        self.meter = self.tenant.meter(given["filter"], **given["aggregation"])
        externals = {customer["id"]: customer["external_id"] for customer in case["given"]["customers"]}
        named_by = {"external_id": externals["c1"]} if "c1" in externals else {}
        self.customer = self.tenant.customer(**named_by)
        self._other_meter = self.tenant.meter()
        self._move_clock(case["given"]["events"])

    def _move_clock(self, events: list[Json]) -> None:
        """Let everything happen at its distance from the case's first instant."""
        instants = [instant(event[name]) for event in events for name in ("timestamp", "ingested_at") if name in event]
        beginning, first = self.server.now + timedelta(days=1), min(instants, default=self.server.now)
        for event in sorted(events, key=lambda event: event.get("ingested_at", event["timestamp"])):
            arrived = instant(event.get("ingested_at", event["timestamp"]))
            self.server.now = beginning + (arrived - first)
            self._tell(event, beginning + (instant(event["timestamp"]) - first))

    def _tell(self, event: Json, at: datetime) -> None:
        metadata = event["metadata"]
        if event["source"] == "user":
            who = {"external_customer_id": None, "customer_id": self.customer} if event["customer"] else {
                "external_customer_id": event["external_customer_id"]
            }  # fmt: skip
            text = exact.encode(metadata).decode()
            sent = {key: value for key, value in who.items() if value is not None}
            self.tenant.send(_line(event["id"], name=event["name"], timestamp=at.isoformat(), metadata=text, **sent))
        elif event["name"] == "meter.reset":
            self.server.decide(MeterReset(
                id=event["id"], organization_id=self.tenant.id, customer_id=self.customer, meter_ids=[self.meter], at=at
            ))  # fmt: skip
        elif event["name"] == "meter.credited":
            self.server.decide(CreditGranted(
                id=event["id"], organization_id=self.tenant.id, customer_id=self.customer, at=at,
                meter_id=self.meter if metadata["meter_id"] == "m1" else self._other_meter,
                units=Decimal(metadata["units"]), rollover=metadata.get("rollover", False),
            ))  # fmt: skip

    def state(self) -> Json | None:
        """The customer meter, if there is one."""
        answer = self.tenant.ask("GET", f"/v1/customer-meters/{customer_meter_id(self.customer, self.meter)}")
        return exact.decode(answer.content) if answer.is_success else None


def _line(external_id: str, **fields: Any) -> bytes:
    """An event without the customer that tests usually have."""
    if "customer_id" in fields:
        return line(external_id, **{"external_customer_id": None, **fields}).replace(
            b'"external_customer_id": null, ', b""
        )
    return line(external_id, **fields)


@named("customer_meter")
def test_customer_meters_are_polars(case: Case, server: Server) -> None:
    """Consumed, credited and balance; and a meter that nothing matched has no row."""
    told = Told(server, case)
    ours, then = told.state(), case["then"]
    if not then["activated"]:
        agree(case, ours is None, ours)
        return
    assert ours is not None
    names = ("consumed_units", "credited_units", "balance")
    agree(case, all(same_number(Decimal(ours[name]), then[name]) for name in names), ours)


@named("rollover")
def test_a_reset_carries_over_what_polars_carries(case: Case, server: Server) -> None:
    """After a reset, what is credited is what rolled over."""
    told = Told(server, case)
    server.now += timedelta(seconds=1)
    told.tenant.post(f"/v1/customers/{told.customer}/resets", {"meter_ids": [told.meter]})
    ours = told.state()
    assert ours is not None
    agree(case, ours["credited_units"] == case["then"]["rollover_units"], ours)


@named("credits")
def test_benefits_credit_as_polars_do(case: Case, server: Server) -> None:
    """Grants, cycles and revocations, and the balance after them."""
    told = Told(server, case)
    grants: dict[str, str] = {}
    balances = []
    for step in case["when"]["params"]["steps"]:
        server.now += timedelta(seconds=1)
        ((what, of),) = step.items()
        if what == "grant":
            grants[of["benefit"]] = grant(told, of)
        else:
            told.tenant.post(f"/v1/benefit-grants/{grants[of]}/{what}", {})
        state = told.state()
        assert state is not None
        balances.append(state["balance"])
    then = case["then"]
    same = balances[-1] == then["balance"] and balances == then.get("balance_after_each", balances)
    agree(case, same, balances)


def grant(told: Told, stated: Json) -> str:
    """Make the benefit and grant it; the grant's id."""
    properties = {"meter_id": told.meter, "units": stated["units"], "rollover": stated["rollover"]}
    body = {"type": "meter_credit", "description": stated["benefit"].ljust(3), "properties": properties}
    benefit = told.tenant.post("/v1/benefits/", body)["id"]
    made: str = told.tenant.post(f"/v1/benefits/{benefit}/grants", {"customer_id": told.customer})["id"]
    return made


PRICED = [case for case in cases("billing") if case["when"]["op"] == "metered_price_amount"]


@pytest.mark.parametrize("case", PRICED, ids=[case["id"] for case in PRICED])
def test_charges_are_polars(case: Case, server: Server) -> None:
    """Cents for units: half away from zero, and the cap."""
    params, tenant = case["when"]["params"], server.tenant()
    meter, customer = tenant.meter(func="sum", property="units"), tenant.customer(external_id="ann")
    price = {"unit_amount": params["unit_amount"], "cap_amount": params["cap_amount"]}
    assert tenant.ask("PUT", f"/v1/meters/{meter}/price", json=price).is_success
    tenant.send(line("a", metadata=f'{{"units": {params["units"]}}}'))
    (item,) = tenant.get(f"/v1/customers/{customer}/charges")["items"]
    agree(case, item["amount"] == case["then"]["amount"], item)


def test_what_is_not_here_is_named() -> None:
    """Every case of billing is either held above or has a reason why nothing here could hold it."""
    assert {case["id"] for case in cases("billing")} == {case["id"] for case in PRICED} | NOT_HERE.keys()
