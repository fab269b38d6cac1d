"""The other side: requests to a Polar organization (or to anything that speaks its API), each within the limit.

``send`` makes one request and judges nothing: the forwarder has its own rules. ``insist`` tries again by itself, and so
do ``get`` and ``pages``, which read: it is for what changes nothing when it is done twice. All of them take a place of
the ``RequestWindow`` first, so whatever shares its file shares the limit.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from aggregator.forward.answer import Answer, is_passing, pages
from aggregator.forward.pace import Circuit, jitter, pause_after, retry_after_s
from aggregator.forward.request_window import RequestWindow

SERVERS = {"production": "https://api.polar.sh", "sandbox": "https://sandbox-api.polar.sh"}
INGEST_PATH = "/v1/events/ingest"
BODY_BYTES_MAX = 10_485_760  # Polar's
ANSWER_TIMEOUT_S = 60.0  # an upstream that is busy with a large batch may take most of a minute
CONNECT_TIMEOUT_S = 10.0
ATTEMPTS_MAX = 10  # with growing pauses: several minutes of an upstream that is away


class NoAnswer(Exception):
    """There was no whole answer: the request may have been carried out, or not."""

    def __init__(self, message: str, is_timeout: bool = False) -> None:
        super().__init__(message)
        self.is_timeout = is_timeout


class Denied(Exception):
    """The upstream refuses us or the request: trying again gives the same. The message says what to do."""


def base_url(server: str) -> str:
    """The address of ``production``, ``sandbox``, or of a URL given as such. Raises ValueError."""
    if server in SERVERS:
        return SERVERS[server]
    if server.startswith(("https://", "http://")):
        return server.rstrip("/")
    raise ValueError(f"{server!r} is neither {', '.join(SERVERS)} nor a URL that begins with https://")


class Upstream:
    """An authenticated connection. A context manager; one thread at a time."""

    def __init__(
        self, server: str, token: str, window: RequestWindow, *, timeout_s: float = ANSWER_TIMEOUT_S,
        on_trouble: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        """``on_trouble`` hears, once, why a request is tried again: for whoever would wonder what takes so long."""
        self.url, self.window, self._on_trouble = base_url(server), window, on_trouble
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}", "User-Agent": "meterstream"},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
        )

    def __enter__(self) -> "Upstream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._http.close()

    def send(
        self, method: str, path: str, *, params: Mapping[str, Any] | None = None, content: bytes | None = None
    ) -> Answer:
        """One request, when the window has a place. Raises NoAnswer."""
        head = {"Content-Type": "application/json"} if content is not None else {}
        place = self.window.take()
        try:
            response = self._http.request(method, path, params=params, content=content, headers=head)
        except httpx.LocalProtocolError:
            raise NoAnswer("the token has characters that no header may have") from None  # its text would show them
        except httpx.HTTPError as error:
            is_timeout = isinstance(error, httpx.TimeoutException)
            raise NoAnswer(f"{type(error).__name__}: {error}", is_timeout) from error
        finally:
            self.window.ended(place)
        return Answer(response.status_code, dict(response.headers), response.content)

    def ingest(self, body: bytes) -> Answer:
        """One batch of events, ``{"events": [...]}``. Raises NoAnswer."""
        return self.send("POST", INGEST_PATH, content=body)

    def get(self, path: str, **params: Any) -> Any:
        """The JSON object of a read, decimals exact; tried again while that helps. Raises Denied, NoAnswer."""
        given = {name: value for name, value in params.items() if value is not None}
        answer = self.insist("GET", path, given)
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):  # a page of a proxy, say
            raise NoAnswer(f"{self.url}{path} answered {answer.status} with something else than a JSON object")
        return found

    def insist(
        self, method: str, path: str, params: Mapping[str, Any] | None = None, content: bytes | None = None
    ) -> Answer:
        """A success; the request is made again while that helps. Raises Denied, NoAnswer."""
        circuit = Circuit()
        while True:
            pause_s = self._pause_before_retry(circuit, method, path, params, content)
            if not isinstance(pause_s, float):
                return pause_s
            self.window.clock.pause(pause_s)

    def _pause_before_retry(
        self, circuit: Circuit, method: str, path: str, params: Mapping[str, Any] | None, content: bytes | None
    ) -> Answer | float:
        """The answer, or how long to wait before the next try."""
        try:
            answer = self.send(method, path, params=params, content=content)
        except NoAnswer as error:
            if circuit.failures + 1 >= ATTEMPTS_MAX:
                raise
            self._tell(f"{self.url} does not answer: {error}")
            return circuit.failed(self.window.clock.now_us(), None, jitter())
        if answer.is_success:
            return answer
        if not is_passing(answer.status):
            raise Denied(f"{self.url}{path} answered {answer.status}: {answer.words()}")
        if circuit.failures + 1 >= ATTEMPTS_MAX:
            raise NoAnswer(f"{self.url}{path} still answers {answer.status}: {answer.words()}")
        self._tell(f"{self.url} answers {answer.status}: {answer.words()}")
        now_us = self.window.clock.now_us()
        wish_s = circuit.failed(now_us, retry_after_s(answer.headers.get("retry-after"), now_us), jitter())
        return max(wish_s, pause_after(circuit.failures, jitter()))  # wishes of no time would use up the attempts

    def _tell(self, trouble: str) -> None:
        if self._on_trouble is not None:
            self._on_trouble(trouble)
            self._on_trouble = None

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list, page by page. Raises Denied, NoAnswer."""
        return pages(self.get, path, **params)
