"""Accounts as text tables: what happened on which day, and what the customer meter said after it.

    day  what happens               credited  consumed  balance
    1    grant plan 100                  100         0      100
    2    use 30                          100        30       70

``polar grants 100`` and ``polar renews 100 from 31`` are Polar's webhooks; the meter is Polar's then. Everything goes
over HTTP. After each line the movements of the ledger have to add up to the balance.
"""

from datetime import datetime, timedelta
from decimal import Decimal
from itertools import count
from typing import Any

from meters.aggregation import exact_sum
from meters.ledger.ledger import customer_meter_id
from tests.support.polar.organization import Polar
from tests.support.records import line
from tests.support.servers.query_api import Server

STEP_S = 1  # between two things that happen on one day


class Book:
    """One customer with one meter, and the benefits that the table names."""

    def __init__(self, server: Server, **aggregation: Any) -> None:
        self.server, self.tenant = server, server.tenant()
        self._beginning = server.now  # a log's clock never goes back
        self.meter = self.tenant.meter(**(aggregation or {"func": "sum", "property": "units"}))
        self.customer = self.tenant.customer(external_id="ann")
        self.id = customer_meter_id(self.customer, self.meter)
        self._grants: dict[str, str] = {}
        self._benefits: dict[str, str] = {}
        self._credits: dict[str, str] = {}  # by units, the last one at the end
        self._polar: Polar | None = None
        self._sent, self._second = count(), count()

    def check(self, table: str) -> None:
        """Do what each line says and compare what it states."""
        for row in table.strip().splitlines()[1:]:
            day, *words, credited, consumed, balance = row.split()
            seconds = next(self._second) * STEP_S
            self.server.now = self._day(day) + timedelta(seconds=seconds)
            self._do(*words)
            expected = tuple(map(Decimal, (credited, consumed, balance)))
            assert self.state() == expected, row
            self.check_ledger()

    def state(self) -> tuple[Decimal, ...]:
        """Credited, consumed and balance, as the customer meter says."""
        found = self.tenant.get(f"/v1/customer-meters/{self.id}")
        return tuple(Decimal(found[name]) for name in ("credited_units", "consumed_units", "balance"))

    def check_ledger(self) -> None:
        """The movements add up to the balance, and the newest one ends with it."""
        entries = self.tenant.get(f"/v1/customer-meters/{self.id}/ledger", limit=100)["items"]
        assert exact_sum(Decimal(entry["units"]) for entry in entries) == self.state()[2]
        assert Decimal(entries[0]["balance"]) == self.state()[2]

    def causes(self) -> list[str]:
        """Why the balance moved, oldest first."""
        found = self.tenant.get(f"/v1/customer-meters/{self.id}/ledger", limit=100)["items"]
        return [entry["cause"] for entry in reversed(found)]

    def _do(self, what: str, *rest: str) -> None:
        match (what, *rest):
            case ("use", units, *when):
                self._use(units, *when)
            case ("give", units, *rollover):
                given = {"meter_id": self.meter, "units": int(units), "rollover": rollover == ["rollover"]}
                made = self.tenant.post(f"/v1/customers/{self.customer}/credits", given)["id"]
                self._credits = {key: id for key, id in self._credits.items() if key != units} | {units: made}
            case ("take", "back", *of):
                credit = self._credits[of[0] if of else [*self._credits][-1]]
                assert self.tenant.ask("DELETE", f"/v1/customers/{self.customer}/credits/{credit}").is_success
            case ("reset", *when):
                at = {"at": self._day(when[1]).isoformat()} if when else {}
                self.tenant.post(f"/v1/customers/{self.customer}/resets", at | {"meter_ids": "all"})
            case ("grant", name, units, *rollover):
                self._grant(name, int(units), rollover == ["rollover"])
            case ("cycle" | "revoke", name, *when):
                at = {"at": self._day(when[1]).isoformat()} if when else {}
                self.tenant.post(f"/v1/benefit-grants/{self._grants[name]}/{what}", at)
            case ("polar", "grants", units, *rollover):
                self._hear(int(units), rollover == ["rollover"], self.server.now)
            case ("polar", "renews", units, *words):
                self._hear(int(units), words[0] == "rollover", self._day(words[-1]), renews=True)
            case _:
                raise ValueError(f"nobody knows what {what} means")

    def _use(self, units: str, *when: str) -> None:
        stated = {"timestamp": self._day(when[1]).isoformat()} if when else {}
        self.tenant.send(line(f"use {next(self._sent)}", metadata=f'{{"units":{units}}}', **stated))

    def _hear(self, units: int, rollover: bool, at: datetime, *, renews: bool = False) -> None:
        if self._polar is None:
            self._polar = Polar(self.tenant)
            self.tenant.patch(f"/v1/meters/{self.meter}", {"metadata": {"polar_meter_id": self._polar.meter_id}})
        news = [("benefit_grant.updated", self._polar.grant(at, units=units, rollover=rollover))]
        news += [("subscription.cycled", self._polar.subscription(at))] if renews else []
        for kind, told in news:
            assert self._polar.deliver(kind, told, f"{kind} {at}").is_success

    def _day(self, day: str) -> datetime:
        return self._beginning + timedelta(days=int(day))

    def _grant(self, name: str, units: int, rollover: bool) -> None:
        benefit = self.tenant.post("/v1/benefits/", {
            "type": "meter_credit", "description": f"units of {name}",
            "properties": {"meter_id": self.meter, "units": units, "rollover": rollover},
        })["id"]  # fmt: skip
        granted = self.tenant.post(f"/v1/benefits/{benefit}/grants", {"customer_id": self.customer})
        self._benefits[name], self._grants[name] = benefit, granted["id"]
