"""Webhooks from the command line to a receiver, through a real server: killed on the way, nothing stays untold."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

from meters.webhooks import keys
from tests.support.polar.organization import signed
from tests.support.servers.installation import PATIENCE_S, Installation
from tests.support.waiting import eventually


class Receiver(HTTPServer):
    """Takes webhooks, and refuses as many as it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.told: list[tuple[str, Any]] = []  # webhook-id and event
        self.refusals = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    """One delivery."""

    server: Receiver

    def do_POST(self) -> None:
        """Note it and answer."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.told.append((self.headers["webhook-id"], body))
        self.server.refusals -= 1
        self.send_response(503 if self.server.refusals >= 0 else 204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """An address on this machine."""
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_changed_is_told_even_if_the_server_dies(
    installation: Installation, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that was not taken is told by the next life, under the same id; the log shows both attempts."""
    monkeypatch.setenv("METERSTREAM_WEBHOOK_PRIVATE_TARGETS", "true")
    installation.start()
    made = installation.answer("webhooks", "create", receiver.url, "--event", "customer.state_changed")
    assert made["secret"].startswith("whsec_")
    receiver.refusals = 1
    installation.answer("customers", "create", "--email", "ann@example.com", "--external-id", "ann")
    eventually(lambda: receiver.told)
    installation.stop(signal.SIGKILL)
    installation.start()
    eventually(lambda: len(receiver.told) >= 2)
    assert len({id for id, _ in receiver.told}) == 1
    assert receiver.told[-1][1]["data"]["external_id"] == "ann"
    delivered = eventually(
        lambda: [row for row in installation.answer("webhooks", "deliveries") if row["status"] == "delivered"]
    )
    before = len(receiver.told)
    again = installation.answer("webhooks", "redeliver", delivered[0]["event_id"])
    assert again["endpoints"] == 1
    eventually(lambda: len(receiver.told) > before)
    assert receiver.told[-1][0] == delivered[0]["event_id"]
    rotated = installation.answer("webhooks", "rotate", receiver.url)
    assert rotated["secret"] != made["secret"]
    assert installation.answer("webhooks", "disable", made["id"])["enabled"] is False
    assert [row["enabled"] for row in installation.answer("webhooks", "list")] == [False]
    shown = installation.log + str(installation.answer("webhooks", "list"))
    assert not any(secret in shown for secret in (made["secret"], rotated["secret"]))


def test_a_private_target_is_refused_and_polar_is_heard_through_the_gateway(running: Installation) -> None:
    """Nothing is sent to its own network; a source's secret is read from standard input, and its news come in."""
    refused = running.run("webhooks", "create", "https://127.0.0.1:9/")
    assert refused.returncode == 2
    assert "URL: The URL leads to an address that is not public" in refused.stderr
    short = running.run("webhooks", "listen", text="short\n")
    assert (short.returncode, "the secret: Expected" in short.stderr) == (2, True)
    secret = "whsec_of_some_polar_organization"
    made = running.answer("webhooks", "listen", "--name", "polar", text=f"{secret}\n")
    assert made["name"] == "polar"
    assert "whsec_" not in json.dumps(made)
    body = b'{"type": "customer.created",  "data": {"id": "7f8b3c0e-6b1f-4a52-9d52-0f3f2d1f6f11",' \
           b' "created_at": "2026-01-01T00:00:00Z", "external_id": "of-polar", "email": "p@example.com"}}'  # fmt: skip
    headers = signed(body, "delivery-1", int(time.time()), keys(secret)[0])
    told = httpx.post(f"{running.url}/webhooks/polar", content=body, headers=headers, timeout=PATIENCE_S)
    assert (told.status_code, told.json()) == (202, {"status": "accepted"})
    assert running.answer("customers", "state", "of-polar")["email"] == "p@example.com"


def test_what_came_from_polar_is_listed(installation: Installation) -> None:
    """Each delivery with what became of it, and the credits that wait for a meter."""
    installation.start()
    secret = "whsec_secret_of_a_polar_organization"
    installation.answer("webhooks", "listen", text=f"{secret}\n")
    moment = "2026-01-01T00:00:00Z"
    benefit = {"id": "b", "type": "meter_credit", "created_at": moment,
               "properties": {"meter_id": "m", "units": 100}}  # fmt: skip
    customer = {"id": "11111111-1111-4111-8111-111111111111", "created_at": moment}
    grant = {"id": "g", "created_at": moment, "customer_id": customer["id"], "customer": customer, "benefit": benefit,
             "properties": {"last_credited_meter_id": "m", "last_credited_units": 100,
                            "last_credited_at": moment}}  # fmt: skip
    for id, (kind, data) in enumerate([("benefit_grant.created", grant), ("checkout.created", {})]):
        body = json.dumps({"type": kind, "data": data}).encode()
        headers = signed(body, str(id), int(time.time()), keys(secret)[0])
        assert httpx.post(f"{installation.url}/webhooks/polar", content=body, headers=headers).status_code == 202
    shown = installation.answer("polar", "deliveries")
    assert [(one["delivery_id"], one["outcome"]) for one in shown] == [("1", "ignored"), ("0", "applied")]
    assert "no meter here is linked to Polar's meter m" in shown[1]["reasons"]
    (waiting,) = installation.answer("polar", "waiting")
    assert (waiting["polar_meter_id"], waiting["credits"], waiting["units"]) == ("m", 1, 100)
