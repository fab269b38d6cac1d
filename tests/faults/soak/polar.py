"""The Polar of a soak: takes batches of events as Polar does, on bad days too, and remembers what it was given.

One request in eight goes wrong, in a way that the seed decides: before anything is taken, or after everything is.
"""

import json
import random
import threading
from collections import Counter
from collections.abc import Set
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "503 before", "500 after", "cut after")
FAULTY_SHARE = 0.125
TOKEN = "polar_oat_of_the_other_side_0123456789"
SHOWN_MAX = 5  # ids in a complaint


class Polar:
    """A server on loopback, from its making until ``close``."""

    def __init__(self, seed: int) -> None:
        self.sent = self.inserted = self.duplicates = 0  # events of batches that were taken
        self.faults: Counter[str] = Counter()
        self._changed: set[str] = set()
        self._taken: dict[str, int] = {}  # id to the hash of what the event says
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="polar", daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What makes a server forward to it, as fast as it likes."""
        return {
            "METERSTREAM_POLAR_SERVER": f"http://127.0.0.1:{self._server.server_address[1]}",
            "METERSTREAM_POLAR_TOKEN": TOKEN,
            "METERSTREAM_POLAR_REQUESTS_PER_MINUTE": "6000",
        }

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def lacks(self, expected: Set[str]) -> set[str]:
        """Those of the ids that did not come yet."""
        with self._lock:
            return expected - self._taken.keys()

    def problems(self, expected: Set[str]) -> list[str]:
        """I6, in words: events that are lost, made up, or were another when they came again."""
        with self._lock:
            found = {"lacks": expected - self._taken.keys(), "made up": self._taken.keys() - expected,
                     "changed": self._changed}  # fmt: skip
            books = (self.inserted, self.duplicates, self.sent)
        problems = [f"I6: {len(ids)} events {what}, {sorted(ids)[:SHOWN_MAX]}" for what, ids in found.items() if ids]
        if books[0] != len(expected) or books[0] + books[1] != books[2]:
            problems.append(f"I6: {books[0]} inserted and {books[1]} duplicates of {books[2]} sent")
        return problems

    def _answer(self, token: str | None, body: bytes) -> tuple[int, Any]:
        """A status and what to say; no status for nothing to say at all."""
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "invalid_token"}
        with self._lock:
            fault = self._random.choice(FAULTS) if self._random.random() < FAULTY_SHARE else ""
            self.faults[fault] += 1
            if fault in ("429", "503 before"):
                return int(fault[:3]), None
            answer = self._take(json.loads(body)["events"])
        return {"500 after": 500, "cut after": 0}.get(fault, 200), answer

    def _take(self, events: list[dict[str, Any]]) -> dict[str, int]:
        known = len(self._taken)
        for event in events:
            id, says = event["external_id"], hash(json.dumps(event, sort_keys=True))
            if self._taken.setdefault(id, says) != says:
                self._changed.add(id)
        new = len(self._taken) - known
        self.sent, self.inserted = self.sent + len(events), self.inserted + new
        self.duplicates += len(events) - new
        return {"inserted": new, "duplicates": len(events) - new}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        polar = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status, answer = polar._answer(self.headers["authorization"], body)
                self.close_connection = not status
                if not status:
                    return
                content = json.dumps(answer).encode()
                self.send_response(status)
                if status == 429:
                    self.send_header("retry-after", "1")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        return Handler
