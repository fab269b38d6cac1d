"""What is asked of the running server, between faults and at the end."""

import contextlib
import time
from decimal import Decimal
from typing import Any

import httpx
import msgspec

from meters.log import format_position, parse_position
from tests.faults.soak.tally import Expected, Tally
from tests.support.servers.killable_server import Server
from tests.support.waiting import eventually

RANGE = {"start_timestamp": "2026-03-01T00:00:00Z", "end_timestamp": "2026-03-02T00:00:00Z", "interval": "day"}
CALLS = {"conjunction": "and", "clauses": [{"property": "name", "operator": "eq", "value": "call"}]}
METERS: dict[str, dict[str, str]] = {
    "calls": {"func": "count"},
    "tokens": {"func": "sum", "property": "tokens"},
    "cost": {"func": "sum", "property": "_cost.amount"},
}
CREDITED = range(5)  # numbers of the customers that get credits
UNITS = 3
RECOVERY_S_MAX = 180.0
LOOK_AGAIN_S = 0.02
_PASSING = (409, 429, 500, 502, 503, 504)


class Watch:
    """Asks as a client would who knows what it was told."""

    def __init__(self, server: Server, tally: Tally) -> None:
        self._server, self._http, self._tally = server, server.client, tally
        self.credits = 0

    def make_meters(self) -> None:
        """Three meters over every event, and a few customers with credits."""
        self._meters = {}
        for name, aggregation in METERS.items():
            made = {"name": name, "filter": CALLS, "aggregation": aggregation}
            self._meters[name] = self._done("POST", "/v1/meters/", json=made)["id"]
        self._customers = [
            self._done("POST", "/v1/customers/", json={"email": f"{n}@example.com", "external_id": f"customer-{n:04d}"})
            for n in CREDITED
        ]

    def recover(self) -> float:
        """Seconds until events are taken and all that was acknowledged so far is counted. Fails after a while."""
        began_s, position = time.monotonic(), self._tally.log_position
        eventually(lambda: self._takes() and self._has(position), RECOVERY_S_MAX, LOOK_AGAIN_S)
        return time.monotonic() - began_s

    def _takes(self) -> bool:
        return self._answer("POST", "/v1/events/ingest", json={"events": []}) is not None

    def _has(self, position: dict[int, int]) -> bool:
        headers = {"prefer": "wait=5", "log-position": format_position(position)}
        path = f"/v1/meters/{self._meters['calls']}/usage"
        found = self._answer("GET", path, headers=headers, params={"external_customer_id": "customer-0000"})
        as_of = (parse_position(found.headers["as-of"]) or {}) if found is not None else {}
        return found is not None and all(as_of.get(partition, 0) >= end for partition, end in position.items())

    def misses(self) -> str:
        """What is wrong with the number of calls that is shown now: fewer than acknowledged, or more than sent."""
        acknowledged = self._tally.acknowledged
        self.recover()
        shown, sent = self.total("calls"), self._tally.sent
        return "" if acknowledged <= shown <= sent else f"{shown} calls shown, {acknowledged} acknowledged, {sent} sent"

    def total(self, meter: str) -> Decimal:
        """A meter's total over everything."""
        found = self._done("GET", f"/v1/meters/{self._meters[meter]}/quantities", params=RANGE)
        return Decimal(str(found["total"]))

    def totals(self) -> Expected:
        """What the meters show."""
        return Expected(*(self.total(name) for name in Expected._fields))

    def give_credits(self) -> None:
        """Units for every customer, asked for until the answer is yes."""
        self.credits += 1
        for customer in self._customers:
            key = {"idempotency-key": f"credit-{self.credits}-{customer['external_id']}"}
            given = {"meter_id": self._meters["calls"], "units": UNITS}
            self._done("POST", f"/v1/customers/{customer['id']}/credits", json=given, headers=key)

    def balances(self) -> list[tuple[Decimal, Decimal, Decimal]]:
        """Credited, consumed and balance of the credited customers."""
        names, which = ("credited_units", "consumed_units", "balance"), {"meter_id": self._meters["calls"]}
        rows = [
            self._done("GET", "/v1/customer-meters/", params=which | {"customer_id": customer["id"]})["items"][0]
            for customer in self._customers
        ]
        return [tuple(Decimal(str(row[name])) for name in names) for row in rows]  # type: ignore[misc]

    def _answer(self, method: str, path: str, **request: Any) -> httpx.Response | None:
        """The answer; None where it is to be asked for again."""
        with contextlib.suppress(httpx.TransportError):
            found = self._http.request(method, path, **request)
            if found.status_code not in _PASSING:
                assert found.is_success, f"{method} {path}: {found.status_code} {found.text[:300]}"
                return found
        return None

    def _done(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        answer = eventually(lambda: self._answer(method, path, **request), RECOVERY_S_MAX, LOOK_AGAIN_S)
        found: dict[str, Any] = msgspec.json.decode(answer.content)
        return found
