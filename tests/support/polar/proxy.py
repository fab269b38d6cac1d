"""A stand-in for Polar that is real where it counts: a second Meterstream, behind a proxy that fails on request.

The proxy is what Polar is to a client on a bad day. A fault is drawn for each request from a seeded sequence, or asked
for by a test. What the upstream stored is asked from the upstream itself.
"""

import json
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from tests.support.servers.installation import Installation

FAULTS = ("429", "500 after commit", "503 before", "slow", "cut", "garbled")
POISON = "poison"  # events whose id begins so are refused
BREAKING = "breaking"  # and such are answered with 500


class Polar:
    """The proxy. ``fault`` gives the next fault or None; ``now`` is the upstream's own clock."""

    def __init__(self, upstream: Installation, now_us: Callable[[], int], *, slow_s: float = 0.75) -> None:
        self.upstream, self.now_us, self.slow_s = upstream, now_us, slow_s
        self.fault: Callable[[], str | None] = lambda: None
        self.names_the_accused = True
        self.is_denied = False
        self.is_mended = False  # whether it takes events that broke it
        self.refuses_repetitions = False  # as where a customer was deleted since
        self.knows_everybody = False  # the customers of poisoned events too
        self.behind_s = 0.0  # how far the upstream's clock is behind
        self.is_strict = False  # whether it refuses the future, as Polar does
        self.arrivals_us: list[int] = []
        self.faults: dict[str, int] = {}
        self.committed: list[str] = []  # external ids in the order in which the upstream got them, repetitions too
        self.committing = threading.Event()  # set when a batch was committed and its answer is still here
        self.answering = threading.Event()  # cleared by a test that wants to hold answers back
        self.answering.set()
        self._lock = threading.Lock()
        self._http = httpx.Client(timeout=30)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self.answering.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._http.close()

    def seeded(self, seed: int, rate: float) -> None:
        """From now on a fault in ``rate`` of the requests, of a kind that the seed decides."""
        drawn = random.Random(seed)

        def fault() -> str | None:
            return drawn.choice(FAULTS) if drawn.random() < rate else None

        self.fault = fault

    def busiest(self, period_s: float = 60.0) -> int:
        """The most requests that arrived in any window of the period, laid anywhere."""
        arrivals = sorted(self.arrivals_us)
        period_us = int(period_s * 1e6)
        first, most = 0, 0
        for last, at in enumerate(arrivals):
            while arrivals[first] <= at - period_us:
                first += 1
            most = max(most, last - first + 1)
        return most

    def answer(self, body: bytes) -> tuple[int, dict[str, str], bytes, str | None]:
        """Status, headers, content and what goes wrong on the way."""
        with self._lock:
            self.arrivals_us.append(self.now_us())
            fault = self.fault()
            if fault:
                self.faults[fault] = self.faults.get(fault, 0) + 1
        if self.is_denied:
            return 401, {}, b'{"error":"invalid_token","error_description":"The access token is revoked."}', None
        if fault == "429":
            return 429, {"retry-after": "1"}, b"", None
        if fault == "503 before":
            return 503, {}, b"upstream connect error", None
        events = json.loads(body)["events"]
        if not self.is_mended and any(event["external_id"].startswith(BREAKING) for event in events):
            return 500, {}, b"Internal Server Error", None
        refused = self._refused(events)
        if refused:
            return 422, {}, json.dumps({"error": "RequestValidationError", "detail": refused}).encode(), None
        status, content = self._pass_on(body)
        with self._lock:
            if status == 200:
                self.committed += [event["external_id"] for event in events]
        self.committing.set()
        self.answering.wait(30)
        if fault == "500 after commit":
            return 500, {}, b"Internal Server Error", None
        if fault == "garbled":
            return 200, {}, b'{"inserted": "', None
        return status, {}, content, fault

    def _pass_on(self, body: bytes) -> tuple[int, bytes]:
        response = self._http.post(
            f"{self.upstream.url}/v1/events/ingest", content=body,
            headers={"Authorization": f"Bearer {self.upstream.token}", "Content-Type": "application/json"},
        )
        return response.status_code, response.content

    def _refused(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        now = datetime.now(UTC) - timedelta(seconds=self.behind_s)
        found = []
        for index, event in enumerate(events):
            loc = ["body", "events", index] if self.names_the_accused else ["body"]
            is_gone = self.refuses_repetitions and event["external_id"] in self.committed
            if is_gone or (event["external_id"].startswith(POISON) and not self.knows_everybody):
                message = "Customer not found."
                found.append({"type": "customer_id", "loc": [*loc, "customer_id"], "msg": message, "input": None})
            elif self.is_strict and datetime.fromisoformat(event["timestamp"]) > now:
                message = "Value error, Timestamp must be in the past."
                found.append({"type": "value_error", "loc": [*loc, "timestamp"], "msg": message, "input": None})
        return found

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        polar = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status, headers, content, fault = polar.answer(body)
                if fault == "slow":
                    time.sleep(polar.slow_s)
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(content) + (10 if fault == "cut" else 0)))
                    self.end_headers()
                    self.wfile.write(content)
                    self.wfile.flush()
                except OSError:
                    self.close_connection = True  # who asked is gone
                if fault in ("cut", "slow"):
                    self.close_connection = True

        return Handler


def stored(installation: Installation, name: str) -> list[dict[str, Any]]:
    """Every event of this name that the installation counted, in its order, from its own feed."""
    found: list[dict[str, Any]] = []
    position = ""
    while True:
        page = installation.get("/v1/feed/", position=position, limit="10000", name=name).json()
        found += [item["event"] for item in page["items"]]
        if not page["items"]:
            return found
        position = page["position"]


def send(installation: Installation, events: list[dict[str, Any]]) -> None:
    """Ingest events and wait until they are visible."""
    answer = httpx.post(
        f"{installation.url}/v1/events/ingest", json={"events": events},
        headers={"Authorization": f"Bearer {installation.token}"}, timeout=30,
    )
    assert answer.status_code == 200, answer.text
    position = answer.headers["log-position"]
    headers = {"Authorization": f"Bearer {installation.token}", "Prefer": "wait=30", "Log-Position": position}
    assert httpx.get(f"{installation.url}/v1/events/names", headers=headers, timeout=40).status_code == 200
