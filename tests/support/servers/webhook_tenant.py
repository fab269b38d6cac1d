"""A tenant who is told: an endpoint at a receiver, customers who move, and what is left to be told of them."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from aggregator.engine.change_events import review_of
from aggregator.engine.supervisor import Aggregator
from aggregator.store import webhook_outbox
from meters.log import USAGE_EVENTS
from tests.support.records import SMALL, entry, line
from tests.support.servers.query_api import Json, Server, Tenant
from tests.support.servers.webhook_receiver import Delivery, Receiver, receiving, sending
from tests.support.waiting import PATIENCE_S, until


class Told:
    """A tenant with an endpoint at a receiver. Requests are made inside the receiver's loop."""

    def __init__(self, tenant: Tenant, receiver: Receiver) -> None:
        self.tenant, self.receiver = tenant, receiver
        self.secret = self.endpoint_id = ""

    async def ask(self, method: str, path: str, body: Json = None) -> Any:
        """A request with the tenant's token."""
        headers = {"Authorization": f"Bearer {self.tenant.secret}"}
        response = await self.tenant.server.http.request(method, path, headers=headers, json=body)
        assert response.is_success, response.text
        return response.json() if response.content else None

    async def listen(self, *events: str) -> None:
        """Make the endpoint."""
        body = {"url": self.receiver.url} | ({"events": list(events)} if events else {})
        made = await self.ask("POST", "/v1/webhooks/endpoints", body)
        self.endpoint_id, self.secret = made["id"], made["secret"]

    async def customer(self, name: str = "ann") -> str:
        """A customer who is called so by the application; the id."""
        made = await self.ask("POST", "/v1/customers/", {"email": f"{name}@example.com", "external_id": name})
        return str(made["id"])

    async def meter(self) -> str:
        """A meter that counts every event; its id."""
        every = {"conjunction": "and", "clauses": []}
        definition = {"name": "Calls", "filter": every, "aggregation": {"func": "count"}}
        return str((await self.ask("POST", "/v1/meters/", definition))["id"])

    async def use(self, *ids: str, name: str = "ann") -> None:
        """Events of a customer, visible when this returns."""
        lines = [line(id, external_customer_id=name) for id in ids]
        record = entry(*lines, organization_id=self.tenant.id, admitted=True)
        (offset,) = await self.tenant.server.log.append(USAGE_EVENTS, [record])
        assert await self.tenant.server.aggregator.wait_for({0: offset + 1}, PATIENCE_S)

    async def credit(self, customer_id: str, meter_id: str, units: int) -> None:
        """Units by hand."""
        await self.ask("POST", f"/v1/customers/{customer_id}/credits", {"meter_id": meter_id, "units": units})

    async def arrived(self, count: int, passing: timedelta = timedelta()) -> list[Delivery]:
        """Wait until so many deliveries have come, while time passes at every look."""
        def look() -> bool:
            self.tenant.server.now += passing
            return len(self.receiver.deliveries) >= count

        await until(look)
        return self.receiver.deliveries

    async def settled(self) -> None:
        """Wait until nothing is left to be told or made into messages."""
        def idle() -> bool:
            with self.tenant.server.aggregator.outbox() as connection:
                causes = connection.execute(
                    "SELECT count(*) FROM webhook_causes WHERE organization_id = ?", [self.tenant.id]
                ).fetchone()
                return causes == (0,) and webhook_outbox.pending(connection, self.endpoint_id) == []

        await until(idle)


def live(tenant: Tenant, story: Callable[[Told], Awaitable[None]], **settings: Any) -> None:
    """Play a story with a receiver and the sender at work."""
    async def playing() -> None:
        async with receiving() as receiver, sending(tenant.server, **settings):
            await story(Told(tenant, receiver))

    tenant.server.run(playing())


def caused_anew(server: Server, tenant: Tenant, folder: Path) -> set[tuple[str | None, str | None]]:
    """Whom of a tenant a store has to tell of that is made from the log again: by id, or by the application's name."""
    anew = Aggregator(server.log, folder / "anew.duckdb", SMALL)
    anew.start()
    try:
        assert server.run(anew.wait_for(server.aggregator.as_of, PATIENCE_S))
        with anew.outbox() as connection:
            causes = [one for one in webhook_outbox.take_causes(connection) if one.organization_id == tenant.id]
        return {(cause.customer_id, cause.text) for cause in causes if review_of(cause) is None}
    finally:
        anew.stop()
