"""The Polar of a soak: takes batches of events as Polar does, on bad days too, and remembers what it was given.

One request in eight goes wrong, in a way that the seed decides: before anything is taken, or after everything is.
"""

import json
import random
import threading
from collections import Counter
from collections.abc import Set
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.faults.soak.tally import Says

FAULTS = ("429", "503 before", "500 after", "cut after")
FAULTY_SHARE = 0.125
TOKEN = "polar_oat_of_the_other_side_0123456789"


class Polar:
    """A server on loopback, from its making until ``close``."""

    def __init__(self, seed: int) -> None:
        self.sent = self.inserted = 0  # events of batches that were taken, and those that came for the first time
        self.faults: Counter[str] = Counter()
        self._changed: set[str] = set()
        self._taken: dict[str, Says] = {}
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="polar", daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What makes a server forward to it."""
        url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return {"METERSTREAM_POLAR_SERVER": url, "METERSTREAM_POLAR_TOKEN": TOKEN}

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def lacks(self, expected: Set[str]) -> set[str]:
        """Those of the ids that did not come yet."""
        with self._lock:
            return expected - self._taken.keys()

    def taken(self) -> tuple[dict[str, Says], set[str]]:
        """What came, and the ids of what was another when it came again."""
        with self._lock:
            return dict(self._taken), set(self._changed)

    def answer(self, token: str | None, body: bytes) -> tuple[int, Any]:
        """A status and what to say; no status for nothing to say at all."""
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "invalid_token"}
        with self._lock:
            fault = self._random.choice(FAULTS) if self._random.random() < FAULTY_SHARE else ""
            self.faults[fault] += 1
            if fault in ("429", "503 before"):
                return int(fault[:3]), None
            answer = self._take(json.loads(body, parse_float=Decimal)["events"])
        return {"500 after": 500, "cut after": 0}.get(fault, 200), answer

    def _take(self, events: list[dict[str, Any]]) -> dict[str, int]:
        known = len(self._taken)
        for event in events:
            id, metadata = event["external_id"], event["metadata"]
            says = Says(event["external_customer_id"], metadata["tokens"], Decimal(metadata["_cost"]["amount"]))
            if self._taken.setdefault(id, says) != says:
                self._changed.add(id)
        new = len(self._taken) - known
        self.sent, self.inserted = self.sent + len(events), self.inserted + new
        return {"inserted": new, "duplicates": len(events) - new}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        polar = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                body = self.rfile.read(length)
                if len(body) < length:  # who asked was killed meanwhile
                    self.close_connection = True
                    return
                status, answer = polar.answer(self.headers["authorization"], body)
                try:
                    self._say(status, json.dumps(answer).encode())
                except OSError:
                    self.close_connection = True

            def _say(self, status: int, content: bytes) -> None:
                if not status:
                    self.close_connection = True
                    return
                self.send_response(status)
                if status == 429:
                    self.send_header("retry-after", "1")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        return Handler
