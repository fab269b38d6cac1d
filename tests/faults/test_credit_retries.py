"""Credits whose answer was lost: the sender repeats them, and each counts once."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

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


def test_a_credit_is_given_once_however_often_its_sender_has_to_ask(place: Installation) -> None:
    """The aggregator is killed again and again while credits are given; repeated with their keys, none is doubled."""
    choose = random.Random(20261121)
    meter = place.answer("meters", "create", "--name", "units", "--count")["id"]
    customer = place.answer("customers", "create", "--email", "ada@example.com")["id"]
    killed_at = sorted(choose.sample(range(1, CREDITS), KILLS))
    headers = {"Authorization": f"Bearer {place.token}"}
    with httpx.Client(base_url=place.url, headers=headers, timeout=PATIENCE_S) as http:
        for number in range(CREDITS):
            killer = None
            if number in killed_at:
                killer = threading.Thread(target=kill_aggregator, args=(place, choose.random() / 50))
                killer.start()
            _give(http, customer, meter, f"credit {number}")
            if killer is not None:
                killer.join()
                eventually(lambda: http.get("/v1/meters/").is_success)
        listed = http.get(f"/v1/customers/{customer}/credits", params={"limit": 100}).json()
        (row,) = http.get("/v1/customer-meters/", params={"customer_id": customer}).json()["items"]
    assert listed["pagination"]["total_count"] == CREDITS
    assert {credit["units"] for credit in listed["items"]} == {UNITS}
    assert (row["credited_units"], row["balance"]) == (CREDITS * UNITS, CREDITS * UNITS)


def _give(http: httpx.Client, customer: str, meter: str, key: str) -> None:
    """Ask until the answer is yes, as a sender would."""
    body = {"meter_id": meter, "units": UNITS}
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            answer = http.post(f"/v1/customers/{customer}/credits", json=body, headers={"Idempotency-Key": key})
            if answer.status_code == 201:
                return
            assert answer.status_code in (409, 502, 503), answer.text
        except httpx.TransportError:
            pass
        time.sleep(0.05)  # the pause of a polite sender
    raise AssertionError("no answer in time")
