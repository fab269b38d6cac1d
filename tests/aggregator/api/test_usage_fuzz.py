"""Random meters, filters and questions over HTTP, against a bookkeeper in plain Python. Longer with `make fuzz`."""

import random
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.servers.query_api import Server, Tenant
from tests.support.usage_oracle import Book, Customer, Question, questions, rows_of, sample

EXAMPLES = 250  # twenty times as many with --long
EVENTS = 400


class Shop:
    """An organization with usage of customers who are known by one name, by two, or by none."""

    def __init__(self, tenant: Tenant, seed: int) -> None:
        self.tenant = tenant
        two_names = Customer(tenant.customer(external_id="ann"), "ann")
        lone = Customer(tenant.customer(), None)
        self.book = Book([two_names, lone, Customer(None, "eve"), Customer(None, "mallory")], [])
        self.book.events = sample(seed, EVENTS, len(self.book.customers))
        self.meter = tenant.meter()
        names = random.Random(seed)
        lines = []
        for event in self.book.events:
            who = self.book.customers[event.who]
            by_id = who.id and (who.external_id is None or names.random() < 0.5)
            named = f'"customer_id":"{who.id}"' if by_id else f'"external_customer_id":"{who.external_id}"'
            lines.append(
                f'{{"name":"{event.name}","external_id":"{uuid4()}",{named},"timestamp":"{event.at.isoformat()}",'
                f'"metadata":{event.json}}}'.encode()
            )
        tenant.send(*lines)

    def ask(self, question: Question) -> Any:
        """Give the meter the question's definition, and ask."""
        definition = {"filter": question.filter, "aggregation": question.aggregation}
        self.tenant.patch(f"/v1/meters/{self.meter}", definition)
        params = question.params(self.book.customers, random.Random(1))
        return self.tenant.get("/v1/usage", meter_id=self.meter, **params)


@pytest.fixture(scope="module")
def shop(server: Server) -> Shop:
    """Events that are sent once."""
    return Shop(server.tenant(), seed=11)


def test_every_answer_is_the_bookkeepers(shop: Shop, pytestconfig: pytest.Config) -> None:
    """Rows, groups, remainder and total, in every zone and over changing clocks, for whatever a meter can be."""

    def check(question: Question) -> None:
        shop.book.check(question, *rows_of(shop.ask(question)))

    examples = EXAMPLES * (20 if pytestconfig.getoption("long") else 1)
    every: st.SearchStrategy[Question] = questions(len(shop.book.customers))
    settings(max_examples=examples, deadline=None)(given(every)(check))()
