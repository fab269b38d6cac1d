"""The HTTP client of Polar's API: authenticated requests, the shared request limit, and backoff.

``Upstream`` sends requests; ``Answer`` is a whole response. ``send`` makes one request and does not judge the
response, because the forwarder has its own rules. ``insist``, ``get`` and ``pages`` retry, so they are only for
requests that are safe to repeat. Every request takes a place in the ``RequestWindow`` first. ``Circuit`` counts
failures and computes pauses with jitter. ``meterstream reconcile`` uses this client, too.
"""

import json
import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec

from aggregator.forward.sqlite_errors import transaction
from meters import exact
from meters.backoff import Backoff, retry_after_s

# Responses, and lists in pages.

PAGE_ROWS = 100  # the most that Polar gives at once, and this API like it


class Answer(NamedTuple):
    """A whole answer. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_success(self) -> bool:
        """A 2xx."""
        return 200 <= self.status < 300

    def json(self) -> Any:
        """The body with exact decimals. Raises ValueError."""
        return exact.decode(self.body)

    def words(self) -> str:
        """What the body says, in one line, for a person: its detail, or its first characters."""
        try:
            said = self.json()
        except ValueError:
            return self.body[:200].decode("utf-8", "replace").strip() or f"status {self.status}"
        if isinstance(said, dict):
            said = said.get("detail") or said.get("error_description") or said.get("error") or said
        return said if isinstance(said, str) else json.dumps(said, default=str)[:2_000]


def pages(get: Callable[..., Any], path: str, **params: Any) -> Iterator[dict[str, Any]]:
    """Every item of a list, page by page. ``get`` takes a path and parameters and gives the JSON of the answer."""
    page = 1
    while True:
        answer = get(path, **params, page=page, limit=PAGE_ROWS)
        yield from answer["items"]
        if page >= answer["pagination"]["max_page"]:
            return
        page += 1


def is_passing(status: int) -> bool:
    """Whether the same request may succeed later."""
    return status in (408, 425, 429) or status >= 500


# Pace. Time and random numbers are arguments; only ``jitter`` draws one. Backoff and ``Retry-After`` are in
# ``meters.backoff``.
#
# The window protects the receiver's limit. A request arrives at some time between its start and the end of its
# response. So it occupies its place from its start until a whole period after its end. Then no window of that length,
# at any offset of the receiver's clock, contains more requests than allowed.

REQUESTS_MAX = 300  # a setting: Polar's production allows 500, or 300 by another of its pages, its sandbox 100
PERIOD_S = 60.0  # Polar counts by the minute
PAUSE_MIN_S = 0.5  # after a first failure: most are over by then
PAUSE_MAX_S = 60.0  # an upstream that is away for hours is asked once a minute
BACKOFF = Backoff(PAUSE_MIN_S, PAUSE_MAX_S)
FAILURES_UNTIL_OPEN = 5  # in a row; then one small request probes before the batches go on
IN_FLIGHT_POLL_US = 20_000  # how soon to look again when every place is taken by a request still under way


def free_in_us(ended_us: Sequence[int | None], now_us: int, requests_max: int, period_us: int) -> int:
    """Microseconds until another request may begin; 0 for now.

    ``ended_us`` are when earlier requests ended, None for those under way.
    """
    ended = sorted(at for at in ended_us if at is not None and at > now_us - period_us)
    under_way = sum(at is None for at in ended_us)
    surplus = len(ended) + under_way - requests_max + 1
    if surplus <= 0:
        return 0
    if surplus > len(ended):
        return IN_FLIGHT_POLL_US
    return ended[surplus - 1] + period_us - now_us


class Circuit(msgspec.Struct):
    """What the last answers say of the upstream: failures in a row, and from when on it may be asked again."""

    failures: int = 0
    open_until_us: int = 0

    def state(self, now_us: int) -> str:
        """closed: batches flow; open: nothing is sent; half-open: the next request is a probe."""
        if self.failures < FAILURES_UNTIL_OPEN:
            return "closed"
        return "open" if now_us < self.open_until_us else "half-open"

    def succeeded(self) -> None:
        """There was an answer that is no failure of the upstream."""
        self.failures, self.open_until_us = 0, 0

    def failed(self, now_us: int, asked_s: float | None, draw: float) -> float:
        """Count a failure; the seconds to wait. ``asked_s`` is the upstream's own wish, ``draw`` of [0, 1) the jitter.

        A wish replaces the backoff, however long that is, plus a little jitter: Polar counts requests by the minute and
        knows when there is room. (The client library takes the longer of the two, since it knows no such limit.)
        """
        self.failures += 1
        pause_s = BACKOFF.pause_s(self.failures, draw) if asked_s is None else asked_s + draw * PAUSE_MIN_S
        self.open_until_us = now_us + int(pause_s * 1e6)
        return pause_s


def jitter() -> float:
    """A draw of [0, 1) for whoever has no reason to repeat a run."""
    return random.random()  # noqa: S311 (no secret hangs on it)


# The request limit, kept in a file that survives restarts and that all processes share.
#
# A request takes a place before it starts, and its end is recorded when the response has arrived. A place that a
# killed process left open counts as ended when the file is opened again, since its request cannot arrive later. If no
# process opens the file again, the place ends once it has been seen open for longer than any request lasts.
#
# The file uses wall-clock time, the only clock that processes share. Each process also tracks its own requests with a
# monotonic clock, so a step of the wall clock cannot let it exceed the limit.
#
#     requests(number, ended_us)    the places of the last period; ended_us is NULL while a request is in progress

BUSY_WAIT_S = 30.0  # another process holds the file for milliseconds
UNDER_WAY_MAX_US = 600_000_000  # no request lasts this long: its process is gone


class Clock(NamedTuple):
    """The world's time. ``now_us``: UTC, microseconds since 1970. ``pause`` waits; it may raise to end its caller.

    ``steady_us``: microseconds since whenever, by a clock that nobody sets.
    """

    now_us: Callable[[], int]
    pause: Callable[[float], None]
    steady_us: Callable[[], int]


SYSTEM_CLOCK = Clock(lambda: time.time_ns() // 1000, time.sleep, lambda: time.monotonic_ns() // 1000)


class RequestWindow:
    """At most ``requests_max`` requests in any ``period_s``, whoever shares the file. One thread at a time."""

    def __init__(
        self, path: Path, requests_max: int = REQUESTS_MAX, period_s: float = PERIOD_S, clock: Clock = SYSTEM_CLOCK,
        *, is_reader: bool = False,
    ) -> None:
        self.requests_max, self.period_s, self.clock = requests_max, period_s, clock
        self._period_us = int(period_s * 1e6)
        self._own: dict[int, int | None] = {}  # places of this process: when they ended, by the steady clock
        self._seen: dict[int, int] = {}  # places of others under way: when that was seen first, by the same
        self._file = sqlite3.connect(path, timeout=BUSY_WAIT_S, isolation_level=None, check_same_thread=False)
        self._file.execute("PRAGMA journal_mode = WAL").fetchone()
        self._file.execute("CREATE TABLE IF NOT EXISTS requests (number INTEGER PRIMARY KEY AUTOINCREMENT, ended_us)")
        if not is_reader:  # whoever only looks says nothing about the requests of others
            self._file.execute("UPDATE requests SET ended_us = ? WHERE ended_us IS NULL", [clock.now_us()])

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def take(self) -> int:
        """Wait until a request may begin; the number of its place."""
        while True:
            place, wait_us = self._try()
            if place is not None:
                return place
            self.clock.pause(wait_us / 1e6)

    def ended(self, place: int) -> None:
        """The request of this place is over, whatever became of it."""
        steady_us = self.clock.steady_us()
        self._own[place] = steady_us  # before it is written: on a full disk it would be under way for ever
        since_us = steady_us - self._period_us
        self._own = {number: at_us for number, at_us in self._own.items() if at_us is None or at_us > since_us}
        self._file.execute("UPDATE requests SET ended_us = ? WHERE number = ?", [self.clock.now_us(), place])

    def wait_s(self) -> float:
        """How long until a request may begin, for who would rather do something else meanwhile; 0 for now."""
        with transaction(self._file):
            return self._wait_us(self.clock.now_us()) / 1e6

    def used(self) -> int:
        """How many places are taken now."""
        since_us = self.clock.now_us() - self._period_us
        sql = "SELECT COUNT(*) FROM requests WHERE ended_us IS NULL OR ended_us > ?"
        with closing(self._file.execute(sql, [since_us])) as found:
            return int(found.fetchone()[0])

    def _try(self) -> tuple[int | None, int]:
        now_us = self.clock.now_us()
        place: int | None = None
        with transaction(self._file):
            wait_us = self._wait_us(now_us)
            if not wait_us:
                place = self._file.execute("INSERT INTO requests VALUES (NULL, NULL)").lastrowid
        if place is not None:
            self._own[place] = None
        return place, wait_us

    def _wait_us(self, now_us: int) -> int:
        self._forget(now_us)
        ends_us: dict[int, int | None] = dict(self._file.execute("SELECT number, ended_us FROM requests").fetchall())
        steady_us = self.clock.steady_us()
        for place, at_us in self._own.items():
            ended_us = at_us if at_us is None else now_us - (steady_us - at_us)
            if ended_us is not None and ends_us.get(place, 0) is None:  # there was no room to write it
                self._file.execute("UPDATE requests SET ended_us = ? WHERE number = ?", [ended_us, place])
            ends_us[place] = ended_us
        others = {place for place, at_us in ends_us.items() if at_us is None} - self._own.keys()
        for place in self._gone(others, steady_us):
            self._file.execute("UPDATE requests SET ended_us = ? WHERE number = ?", [now_us, place])
            ends_us[place] = now_us
        return free_in_us(list(ends_us.values()), now_us, self.requests_max, self._period_us)

    def _gone(self, under_way: set[int], steady_us: int) -> list[int]:
        """Of the places that others hold, those that have been seen under way for longer than a request lasts."""
        self._seen = {place: self._seen.get(place, steady_us) for place in under_way}
        return [place for place, since_us in self._seen.items() if steady_us - since_us >= UNDER_WAY_MAX_US]

    def _forget(self, now_us: int) -> None:
        """Drop what left the window. A clock that was set back makes old ends new ones: waiting longer is harmless."""
        self._file.execute("UPDATE requests SET ended_us = ? WHERE ended_us > ?", [now_us, now_us])
        since_us = now_us - max(self._period_us, UNDER_WAY_MAX_US)
        self._file.execute("DELETE FROM requests WHERE ended_us <= ?", [since_us])


# The connection.

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
        return max(wish_s, BACKOFF.pause_s(circuit.failures, jitter()))  # wishes of no time would use up the attempts

    def _tell(self, trouble: str) -> None:
        if self._on_trouble is not None:
            self._on_trouble(trouble)
            self._on_trouble = None

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list, page by page. Raises Denied, NoAnswer."""
        return pages(self.get, path, **params)
