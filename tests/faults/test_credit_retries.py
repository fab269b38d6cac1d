"""Credits and renewals whose answer was lost: the sender repeats them, and each counts once."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers.installation import Installation, started
from tests.support.waiting import eventually

CREDITS, UNITS, KILLS = 24, 3, 3
PATIENCE_S = 60


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Installation]:
    """A running server."""
    with started(tmp_path) as place:
        yield place


def kill_aggregator(place: Installation, after_s: float) -> None:
    """SIGKILL, somewhere in the middle of a request."""
    time.sleep(after_s)
    os.kill(place.children()["aggregate"], signal.SIGKILL)


def test_what_moves_a_balance_happens_once_however_often_its_sender_has_to_ask(place: Installation) -> None:
    """The aggregator is killed again and again while credits are given and a benefit is renewed, each under a key.

    Repeated with their keys, none is doubled. All of it rolls over, so that nothing is lost with a renewal.
    """
    choose = random.Random(20261121)
    meter = place.answer("meters", "create", "--name", "units", "--count")["id"]
    customer = place.answer("customers", "create", "--email", "ada@example.com")["id"]
    killed_at = sorted(choose.sample(range(1, CREDITS), KILLS))
    headers = {"Authorization": f"Bearer {place.token}"}
    with httpx.Client(base_url=place.url, headers=headers, timeout=PATIENCE_S) as http:
        properties = {"meter_id": meter, "units": UNITS, "rollover": True}
        body = {"type": "meter_credit", "description": "Units", "properties": properties}
        benefit = http.post("/v1/benefits/", json=body).raise_for_status().json()["id"]
        granting = http.post(f"/v1/benefits/{benefit}/grants", json={"customer_id": customer})
        grant = granting.raise_for_status().json()["id"]
        steps = [(f"/v1/customers/{customer}/credits", properties), (f"/v1/benefit-grants/{grant}/cycle", {})]
        for number in range(CREDITS):
            killer = None
            if number in killed_at:
                killer = threading.Thread(target=kill_aggregator, args=(place, choose.random() / 50))
                killer.start()
            for path, body in steps:
                _ask(http, path, body, f"step {number}")
            if killer is not None:
                killer.join()
                eventually(lambda: http.get("/v1/meters/").is_success)
        listed = http.get(f"/v1/customers/{customer}/credits", params={"limit": 100}).json()["items"]
        (row,) = http.get("/v1/customer-meters/", params={"customer_id": customer}).json()["items"]
    assert Counter(credit["cause"] for credit in listed) == {
        "grant": 1, "credit": CREDITS, "cycle": CREDITS, "rollover": CREDITS
    }  # fmt: skip
    units = (2 * CREDITS + 1) * UNITS
    assert (row["credited_units"], row["balance"]) == (units, units)


def _ask(http: httpx.Client, path: str, body: dict[str, Any], key: str) -> None:
    """Ask until the answer is yes, as a sender would."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            answer = http.post(path, json=body, headers={"Idempotency-Key": key})
            if answer.is_success:
                return
            assert answer.status_code in (409, 502, 503), answer.text
        except httpx.TransportError:
            pass
        time.sleep(0.05)  # the pause of a polite sender
    raise AssertionError("no answer in time")
