"""Linking in any order ends in one customer with the sum of all, held against an independent bookkeeper."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.support.polar.organization import BEGINNING, Polar
from tests.support.records import line
from tests.support.servers.query_api import Tenant, serving

Json = dict[str, Any]
DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)
STEPS, ORGANIZATIONS = 20, 15
POLARS, LOCAL = "polars", "local"
Step = tuple[str, int]  # what happened to one of the two, and how much


@dataclass
class Bookkeeper:
    """What happened, in order, to each of the two: who is who is said at the end."""

    moved: list[tuple[str, Step]] = field(default_factory=list)

    def balance(self, *whose: str) -> tuple[int, int, int]:
        """Credited, consumed and left of some as one customer. A grant of 100 of Polar's is before everything else."""
        plain, rolling, used = 100 if POLARS in whose else 0, 0, 0
        for who, (what, units) in self.moved:
            if who not in whose:
                continue
            if what == "use":
                used += units
            elif what == "credit":
                plain += units
            elif what == "rollover":
                rolling += units
            else:  # a reset: credits without rollover are used first
                rolling, plain, used = max(0, min(plain + rolling - used, rolling)), 0, 0
        return plain + rolling, used, plain + rolling - used


class Story:
    """One organization in which a customer of Polar's and a local one are told of in a random order."""

    def __init__(self, tenant: Tenant, random: Random) -> None:
        self.tenant, self.random, self.polar, self.books = tenant, random, Polar(tenant), Bookkeeper()
        self.meter = self.polar.mirrored_meter()
        properties = {"meter_id": self.meter, "units": 30, "rollover": False}
        benefit = {"type": "meter_credit", "description": "local", "properties": properties}
        self.benefit: str = tenant.post("/v1/benefits/", benefit)["id"]
        self.local: str | None = None
        self.is_named = False  # the local one, with the external id that Polar's gets
        self.grants: set[str] = set()
        nameless = self.polar.customer(external_id=None)
        named = self.polar.customer(BEGINNING + DAY)
        grant = self.polar.grant(BEGINNING)
        self.news = [
            ("customer.created", nameless),
            ("customer.updated", named),
            ("benefit_grant.created", grant | {"customer": random.choice([named, nameless])}),
        ]
        self.untold = list(self.news)

    def tell(self) -> None:
        """Deliver news of Polar's, sometimes again."""
        fresh = self.random.choice(self.untold) if self.untold else None
        news = fresh if fresh is not None and self.random.random() < 0.7 else self.random.choice(self.news)
        self.untold = [one for one in self.untold if one is not news]
        id = f"{self.news.index(news)}" if self.random.random() < 0.5 else f"again-{self.random.random()}"
        assert self.polar.deliver(*news, id).status_code == 202

    def know(self) -> None:
        """Create the local customer, or give it its external id, unless another one has that."""
        fields = {"external_id": "ann"} if self.random.random() < 0.7 else {}
        if self.local is None:
            answer = self.tenant.ask(
                "POST", "/v1/customers/", json={"email": f"{self.random.random()}@example.com", **fields}
            )
            self.local = answer.json()["id"] if answer.is_success else None
        elif fields:
            answer = self.tenant.ask("PATCH", f"/v1/customers/{self.local}", json=fields)
        else:
            return
        assert answer.status_code in (200, 201, 422)
        self.is_named = self.is_named or (answer.is_success and bool(fields))

    def use(self) -> None:
        """Usage under one of the three names; the external id is of whom it will be."""
        name, units = self.random.choice(["ann", "polar", "local"]), self.random.randint(1, 9)
        who, named = POLARS, {"external_customer_id": "ann"}
        if name != "ann":
            id = self.polar.customer_id if name == "polar" else self.local
            if id is None:
                return
            who, named = (POLARS if name == "polar" else LOCAL), {"external_customer_id": None, "customer_id": id}
        self.tenant.send(*(line(f"{self.random.random()}", **named) for _ in range(units)))
        self.books.moved.append((who, ("use", units)))

    def move(self) -> None:
        """A credit, a reset or a local grant, by one of the ids."""
        who = self.random.choice([POLARS, LOCAL])
        id = self.polar.customer_id if who == POLARS else self.local
        if id is None or not self.tenant.ask("GET", f"/v1/customers/{id}").is_success:
            return
        what = self.random.choice(["credit", "rollover", "reset", "grant"])
        units = self.random.randint(1, 50)
        if what == "reset":
            self.tenant.post(f"/v1/customers/{id}/resets", {"meter_ids": [self.meter]})
        elif what == "grant":
            grant = self.tenant.post(f"/v1/benefits/{self.benefit}/grants", {"customer_id": id})["id"]
            if grant in self.grants:
                return
            self.grants.add(grant)
            what, units = "credit", 30
        else:
            body = {"meter_id": self.meter, "units": units, "rollover": what == "rollover"}
            self.tenant.post(f"/v1/customers/{id}/credits", body)
        self.books.moved.append((who, (what, units)))

    def tell_all(self) -> None:
        """Deliver what was not told yet."""
        while self.untold:
            self.tell()

    def check(self) -> None:
        """Whoever has the external id has everything of both, unless the local customer never got it."""
        expected = {"ann": self.books.balance(POLARS, LOCAL) if self.is_named else self.books.balance(POLARS)}
        if self.local is not None and not self.is_named:
            expected[self.local] = self.books.balance(LOCAL)
        found = {}
        for customer in self.tenant.get("/v1/customers/")["items"]:
            state = self.tenant.get(f"/v1/customers/{customer['id']}/state")
            meters = state["active_meters"] or [{"credited_units": 0, "consumed_units": 0, "balance": 0}]
            names = ("credited_units", "consumed_units", "balance")
            found[customer["external_id"] or customer["id"]] = tuple(int(Decimal(meters[0][name])) for name in names)
        assert found == expected, self.books.moved
        by_polars_id = self.tenant.get(f"/v1/customers/{self.polar.customer_id}/state")
        assert by_polars_id == self.tenant.get("/v1/customers/external/ann/state")
        if self.is_named:
            assert by_polars_id["id"] == self.local
        (shown,) = self.tenant.get("/v1/customer-meters/", customer_id=self.polar.customer_id)["items"]
        assert shown["customer_id"] == by_polars_id["id"]


@pytest.mark.parametrize("seed", range(2))
def test_linking_in_any_order_ends_in_one_customer(tmp_path: Path, seed: int) -> None:
    """Also after a restart, and after a rebuild from the log."""
    random = Random(seed)
    with serving(tmp_path) as server:
        stories = [Story(server.tenant(), random) for _ in range(ORGANIZATIONS)]
        for _ in range(STEPS):
            for story in stories:
                server.now += MINUTE
                steps: list[Callable[[], None]] = [story.tell, story.know, story.use, story.use, story.move, story.move]
                random.choice(steps)()
        for story in stories:
            server.now += MINUTE
            story.tell_all()
            story.check()
        for store in ("store.duckdb", "rebuilt.duckdb"):
            server.restart(tmp_path / store)
            for story in stories:
                story.check()
        assert 0 < sum(story.is_named for story in stories) < ORGANIZATIONS
