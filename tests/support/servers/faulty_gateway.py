"""A small server of the contract that a test can make behave badly: it answers as told and remembers what it took.

Events count once by their id, as with the real one. The script of a test is a function of the events and of the number
of the request; None means: take them.
"""

import gzip
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple

Events = list[dict[str, Any]]


class Bad(NamedTuple):
    """An answer that is no yes. Status 0 cuts the connection; -1 takes the events and then cuts it."""

    status: int
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b""


Script = Callable[[Events, int], Bad | None]


class FaultServer:
    """On a free port of this machine, for as long as its block lasts."""

    def __init__(self, script: Script = lambda events, number: None, *, port: int = 0) -> None:
        self.script = script
        self.taken: Counter[str] = Counter()
        """How often each id was taken; the server counts it once."""
        self.events: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[int, dict[str, str]]] = []
        """Number of events and headers of each request."""
        self.body_bytes: list[int] = []
        """Length of each request's body, unpacked."""
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"fault": self})
        self._server = _Server(("127.0.0.1", port), handler)
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def answer(self, events: Events, headers: dict[str, str]) -> Bad | tuple[int, int]:
        """What to say to a request."""
        with self._lock:
            self.requests.append((len(events), headers))
            bad = self.script(events, len(self.requests))
            if bad is not None and bad.status >= 0:
                return bad
            known = len(self.taken)
            self.taken.update(event["external_id"] for event in events)
            self.events.update({event["external_id"]: event for event in events})
            new = len(self.taken) - known
            return bad or (new, len(events) - new)

    def __enter__(self) -> "FaultServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with five, whoever connects sixth at a time waits a second for the next try


class _Handler(BaseHTTPRequestHandler):
    fault: FaultServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """One batch."""
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.fault.body_bytes.append(len(body))
        answer = self.fault.answer(json.loads(body)["events"], headers)
        if isinstance(answer, Bad) and answer.status < 1:
            self.close_connection = True
            return
        if isinstance(answer, Bad):
            self._reply(*answer)
        else:
            self._reply(200, {}, json.dumps({"inserted": answer[0], "duplicates": answer[1]}).encode())

    def _reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in {"date": self.date_time_string(), **headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing."""


def refusal(*places: tuple[int, str]) -> Bad:
    """A 422 that names events by index, each with the field at fault, as the schema check of the contract does."""
    detail = [
        {"type": "value_error", "loc": ["body", "events", index, *field.split(".")], "msg": "no", "input": None}
        for index, field in places
    ]
    return Bad(422, {}, json.dumps({"error": "RequestValidationError", "detail": detail}).encode())
