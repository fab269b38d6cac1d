"""A vendor's endpoint that plays back answers: whole, as a stream, cut off in the middle, or after some refusals."""

import json
import threading
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 20.0


@dataclass
class Answer:
    """What is sent back. ``end``: as it should be, ``hold`` the connection until the caller leaves, or ``cut`` it."""

    chunks: list[bytes]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    end: str = "done"
    is_stream: bool = False


def whole(body: Any, status: int = 200, **headers: str) -> Answer:
    """An answer in one piece."""
    return Answer([json.dumps(body).encode()], status, {"Content-Type": "application/json", **headers})


def refusal(status: int) -> Answer:
    """An answer that a client tries again after."""
    error = {"message": "later", "type": "overloaded", "code": status}
    return whole({"error": error}, status, **{"Retry-After-Ms": "1"})


def stream(events: Iterable[Any], *, is_named: bool = False, last: str = "", end: str = "done") -> Answer:
    """Server-sent events; ``is_named`` where the event's type is told on a line of its own."""
    chunks = [
        (f"event: {event['type']}\n" if is_named else "").encode() + b"data: " + json.dumps(event).encode() + b"\n\n"
        for event in events
    ]
    chunks += [f"data: {last}\n\n".encode()] if last else []
    return Answer(chunks, 200, {"Content-Type": "text/event-stream"}, end, True)


class Replay:
    """The endpoint: ``url``, the answers it has yet to give by path, the requests it got, whether it was asked."""

    def __init__(self) -> None:
        self._answers: dict[str, deque[Answer]] = defaultdict(deque)
        self.requests: list[tuple[str, Any]] = []
        self.asked = threading.Event()
        replay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                replay.requests.append((path, json.loads(body or b"null")))
                replay.asked.set()
                left = replay._answers[path]
                _send(self, left.popleft() if left else whole({"error": {"message": f"nothing for {path}"}}, 418))

            do_GET = do_POST

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def will(self, path: str, *answers: Answer) -> None:
        """The next requests for the path get these answers."""
        self._answers[path].extend(answers)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE_S)


def _send(handler: BaseHTTPRequestHandler, answer: Answer) -> None:
    handler.send_response(answer.status)
    for name, value in answer.headers.items():
        handler.send_header(name, value)
    if not answer.is_stream:
        handler.send_header("Content-Length", str(sum(map(len, answer.chunks))))
        handler.end_headers()
        handler.wfile.write(b"".join(answer.chunks))
        return
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for chunk in answer.chunks:
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        handler.wfile.flush()
    if answer.end == "done":
        handler.wfile.write(b"0\r\n\r\n")
        return
    handler.close_connection = True
    if answer.end == "hold":
        handler.connection.settimeout(PATIENCE_S)
        handler.connection.recv(1)  # nothing comes; it returns when the caller closes
