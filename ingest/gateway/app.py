"""The gateway's ASGI application: routes, framing, health, metrics and POST /v1/events/ingest.

``Gateway`` is the application. It checks the framing of a request first, answers ``/livez``, ``/readyz`` and
``/metrics`` itself, hands requests with events to ``IngestEndpoint``, and passes everything else to the query API
(``ingest.gateway.proxy``). It also runs the background tasks and records why one ended. ``IngestEndpoint`` checks
token, scope, quota, encoding and length, in Polar's order, and then hands the body to ``ingest.admission.intake``.

There is no web framework, because nearly all traffic goes to one route. Ordinary requests with events reach
``IngestEndpoint`` directly from ``ingest.gateway.connection``.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from datetime import UTC, datetime
from urllib.parse import parse_qsl

import msgspec

from ingest import metrics, responses
from ingest.admission.batching import Opened, read_preferences
from ingest.admission.intake import Intake
from ingest.catalogue_follower import CatalogueTail
from ingest.gateway.proxy import Upstream
from ingest.limits import BODY_BYTES_MAX, BODY_DEADLINE_S, IN_FLIGHT_BYTES_MAX, InFlight, RequestQuota
from ingest.responses import ENCODINGS, JSON, WITH_BODY, Answer, Gone, Message, Receive, Send, read, send_answer
from meters.catalogue.access import API_VERSION_DEFAULT, Denied, authorize, good_credential, is_good, writing
from meters.catalogue.catalogue import Token
from meters.log import USAGE_EVENTS, Log, TryAgain, seconds_ahead

SCOPES = writing("events")

Headers = Mapping[bytes, bytes]


class EndpointSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoint's bounds. An operator sets ``requests_per_minute``."""

    body_bytes_max: int = BODY_BYTES_MAX
    body_deadline_s: float = BODY_DEADLINE_S
    in_flight_bytes_max: int = IN_FLIGHT_BYTES_MAX
    requests_per_minute: int = 0  # for each token, and each customer at the portal; 0 sets no limit


class IngestEndpoint:
    """Judges requests by their heads; their bodies it hands to its intake."""

    def __init__(self, log: Log, tail: CatalogueTail, settings: EndpointSettings) -> None:
        self.in_flight = InFlight(settings.in_flight_bytes_max)
        self.intake = Intake(log, tail, self.in_flight, settings.body_bytes_max)
        self._tail = tail
        self._settings = settings
        self._quota = RequestQuota(settings.requests_per_minute)

    async def __call__(self, headers: Headers, length: int, receive: Receive, query: bytes = b"") -> Answer:
        """The answer to one request. ``headers`` are lower case, ``length`` is the Content-Length. Raises Gone.

        ``query`` is what stands behind the path: there are no parameters, so any is refused.
        """
        opened = self.open(headers, length)
        if isinstance(opened, Answer):
            return opened
        if refused := _without_parameters(query):
            return refused
        settings = self._settings
        body = await read(receive, settings.body_deadline_s, self.in_flight, settings.body_bytes_max)
        if isinstance(body, Answer):
            return body
        try:
            return await self.intake.taken(opened, body)
        finally:
            self.in_flight.give_back(len(body))

    def open(self, headers: Headers, length: int) -> Opened | Answer:
        """Judge a request by its head."""
        if not self._tail.current:
            return responses.unavailable("CatalogueUnavailable", "Tokens are not known yet.", 1)
        now = datetime.now(UTC)
        token = authorize(_authorization(headers), SCOPES, self._tail.catalogue, now)
        if isinstance(token, Denied):
            challenge = ((name.lower().encode(), value.encode()) for name, value in token.headers.items())
            return Answer(token.status, token.body, (JSON, *challenge))
        wait_s = self._quota.wait_s(token.id, time.monotonic())
        if wait_s:
            return responses.too_many_requests(wait_s)
        encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        if encoding not in ENCODINGS:
            return responses.unsupported_encoding()
        if length > self._settings.body_bytes_max:
            return responses.too_large(self._settings.body_bytes_max)
        return Opened(token, encoding, read_preferences(headers.get(b"prefer", b"")))

    def open_again(self, before: Opened, headers: Headers, length: int) -> Opened | Answer:
        """The same for a head that was judged before: nothing in it can have changed but what its token is good for."""
        token = before.token
        is_good_still = self._tail.catalogue.tokens.get(token.sha256) is token and is_good(token, datetime.now(UTC))
        if not is_good_still or not self._tail.current or length > self._settings.body_bytes_max:
            return self.open(headers, length)
        wait_s = self._quota.wait_s(token.id, time.monotonic())
        return responses.too_many_requests(wait_s) if wait_s else before

    def organization_of(self, headers: Headers, now: datetime) -> str:
        """Whose good token, or whose customer's session, the request shows; empty where it shows none."""
        shown = good_credential(_authorization(headers), self._tail.catalogue, now)
        return shown.organization_id if shown else ""

    def too_many(self, headers: Headers, now: datetime) -> Answer | None:
        """The answer to a token or a customer who asked too often. Whoever shows neither is refused elsewhere."""
        if not self._settings.requests_per_minute:
            return None
        shown = good_credential(_authorization(headers), self._tail.catalogue, now)
        if shown is None:
            return None
        key = shown.id if isinstance(shown, Token) else shown.customer_id  # of whom there are fewer than of sessions
        wait_s = self._quota.wait_s(key, time.monotonic())
        return responses.too_many_requests(wait_s) if wait_s else None


def _without_parameters(query: bytes) -> Answer | None:
    """The refusal of parameters, which the gateway's own routes do not have; None where there are none."""
    names = [name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True)]
    return responses.unknown_parameters(names) if names else None


def _authorization(headers: Headers) -> str:
    return headers.get(b"authorization", b"").decode("latin-1")


# The application. A request whose framing can be read in two ways is refused, and the connection closed.

INGEST = frozenset({"/v1/events/ingest", "/v1/events/ingest/", "/api/v1/events/ingest", "/api/v1/events/ingest/"})
OLD_PREFIX = b"/api/v1/"
OLD_PREFIX_NOTICE = (b"x-polar-deprecation-notice", b"Leave out /api: the path begins with /v1.")

VERSIONS = frozenset({b"2026-04", b"2026-10", b"2027-01"})
"""Versions of Polar's API in which metering is what it is here."""

ONCE = (b"host", b"authorization")
"""Headers of which some read the first and others the last."""

PREFLIGHT = frozenset({b"origin", b"access-control-request-method"})
"""The headers of a browser's question whether a page may send a request."""

LOG_LOOK_S = 30.0
"""Seconds between two looks at the log's partitions; whoever adds some does so rarely."""

LOAD_PATIENCE_S = 0.5
"""Seconds that a start waits for the catalogue before it listens: nearly always enough, and no reason to be late."""

METRICS_PATIENCE_S = 2.0
"""Seconds that the aggregator gets for its part of ``/metrics``."""

logger = logging.getLogger("ingest.gateway")


class GatewaySettings(EndpointSettings, frozen=True, kw_only=True):
    """The same, and where reads go."""

    upstream: str | None = None  # the query API: unix:PATH or http[s]://HOST:PORT; None answers reads with 503


class Gateway:
    """The ASGI application, one for a process, on a log that the caller opened, and closes after it."""

    def __init__(self, log: Log, settings: GatewaySettings) -> None:
        self._log = log
        self._settings = settings
        self.tail = CatalogueTail(log)
        self.endpoint = IngestEndpoint(log, self.tail, settings)
        self.upstream = Upstream(settings.upstream or "unix:")
        self.failure: Exception | None = None  # that ended a background task; the process has to end for it
        self._looked = asyncio.Event()  # at the log, with success
        self._trouble = ""  # why the log could not be read at the last look
        metrics.observe(self.endpoint.in_flight, self.tail)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request, or the life of the process."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            with contextlib.suppress(Gone):
                await self._serve(scope, receive, send)

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        headers = dict(scope["headers"])
        found = _misframed(scope, headers)
        if found is None and path in _OWN:
            own = None if method in ("GET", "HEAD") else responses.method_not_allowed("GET, HEAD")
            own = own or _without_parameters(scope["query_string"]) or await _OWN[path](self)
            await send_answer(send, own)
            return
        version = headers.get(b"polar-version", API_VERSION_DEFAULT)
        if found is None and version not in VERSIONS:
            found = responses.not_found()
        send = functools.partial(_send_with, send, _shown(version, path, headers))
        if found is None and method == "OPTIONS" and headers.keys() >= PREFLIGHT:
            found = responses.preflight()
        elif path in INGEST:
            found = found or await self._ingest(scope, headers, receive)
            metrics.count_request(found.status)
        found = found or self.endpoint.too_many(headers, datetime.now(UTC))
        if found is not None:
            await send_answer(send, found)
        else:
            await self._pass_on(scope, headers, receive, send)

    async def _ingest(self, scope: Message, headers: dict[bytes, bytes], receive: Receive) -> Answer:
        if scope["method"] != "POST":
            return responses.method_not_allowed("POST")
        if b"prefer" in headers:  # may stand in several lines
            headers[b"prefer"] = b",".join([value for name, value in scope["headers"] if name == b"prefer"])
        return await self.endpoint(headers, int(headers[b"content-length"]), receive, scope["query_string"])

    async def _pass_on(self, scope: Message, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        path, length = _current(scope["raw_path"]), int(headers.get(b"content-length", b"0"))
        bytes_max = self._settings.body_bytes_max
        if length > bytes_max:
            metrics.count_passed_on(await send_answer(send, responses.too_large(bytes_max)))
            return
        in_flight = self.endpoint.in_flight
        body = await read(receive, self._settings.body_deadline_s, in_flight, bytes_max) if length else b""
        if isinstance(body, Answer):
            metrics.count_passed_on(await send_answer(send, body))
            return
        try:
            asker = self.endpoint.organization_of(headers, datetime.now(UTC))
            metrics.count_passed_on(await self.upstream.pass_on(scope, path, body, send, asker))
        finally:
            in_flight.give_back(len(body))

    async def live(self) -> Answer:
        """``/livez``: the event loop turns."""
        return Answer(200, b'{"status":"live"}')

    async def ready(self) -> Answer:
        """``/readyz``: tokens are known, and the log writes as far as anyone could tell."""
        checks = {"catalogue": self.tail.current, "log": self.endpoint.intake.writable}
        ready = all(checks.values())
        trouble = self._trouble or self.tail.trouble or self.endpoint.intake.trouble
        waiting = {"waiting_for": trouble} if trouble and not ready else {}
        ahead_s = seconds_ahead(self.tail.newest_us, time.time_ns() // 1000)
        ahead = {"log_clock_ahead_s": ahead_s} if ahead_s else {}
        return Answer(200 if ready else 503, msgspec.json.encode({"ready": ready, "checks": checks} | waiting | ahead))

    async def metrics(self) -> Answer:
        """``/metrics``: this process's, then the aggregator's when it answers."""
        own = metrics.exposition()
        others = await self.upstream.get("/metrics", METRICS_PATIENCE_S) if self._settings.upstream else None
        return Answer(200, own + (others or b""), ((b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),))

    async def _live(self, receive: Receive, send: Send) -> None:
        """From startup to shutdown: the owner of every background task."""
        await receive()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch(self.tail.run()))
            looking = tasks.create_task(self._watch(self._keep_looking()))
            await self.tail.wait_until_loaded(LOAD_PATIENCE_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._looked.wait(), LOAD_PATIENCE_S)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            self.tail.stop()
            looking.cancel()
        self.upstream.close()
        self.endpoint.intake.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _watch(self, work: Coroutine[None, None, None]) -> None:
        """Without one of its tasks a gateway looks alive and serves nobody, so whatever ended it is told."""
        try:
            await work
        except Exception as error:
            self.failure = self.failure or error

    async def _look_at_log(self) -> float:
        """Learn which partitions there are; the seconds until the next look."""
        try:
            self.endpoint.intake.learn(await asyncio.to_thread(self._log.ends, USAGE_EVENTS))
        except TryAgain as error:
            if not self._trouble:
                logger.warning("the log cannot be read yet: %s", error)
            self._trouble = str(error)
            return error.retry_after_s
        self._trouble = ""
        self._looked.set()
        return LOG_LOOK_S

    async def _keep_looking(self) -> None:
        pause_s = 0.0
        while True:
            await asyncio.sleep(pause_s)
            pause_s = await self._look_at_log()


_OWN: dict[str, Callable[[Gateway], Awaitable[Answer]]] = {
    "/livez": Gateway.live,
    "/readyz": Gateway.ready,
    "/metrics": Gateway.metrics,
}


def _current(path: bytes) -> bytes:
    """The path as the query API knows it: without the old prefix, and one document for all versions."""
    if path.startswith(OLD_PREFIX):
        return path[len("/api") :]
    version, _, rest = path[1:].partition(b"/")
    return b"/openapi.json" if rest == b"openapi.json" and version in VERSIONS else path


def _misframed(scope: Message, headers: dict[bytes, bytes]) -> Answer | None:
    """What is wrong with how the request says where it ends, whom it is for, or whose it is."""
    names = [name for name, _ in scope["headers"]]
    if any(names.count(name) > 1 for name in ONCE):
        return responses.bad_request("A request has one Host and one Authorization header.")
    if scope["http_version"] == "1.1" and b"host" not in headers:
        return responses.bad_request("A request needs a Host header.")
    if b"transfer-encoding" in headers:
        if b"content-length" in headers:
            return responses.bad_request("Content-Length and Transfer-Encoding exclude each other.")
        return responses.length_required()
    if scope["method"] in WITH_BODY and b"content-length" not in headers:
        return responses.length_required()
    return None


def _shown(version: bytes, path: str, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """What every answer says of the API: its version, that an old path is old, and to a browser that it may read."""
    shown = [(b"polar-version", version if version in VERSIONS else API_VERSION_DEFAULT)]
    shown += [OLD_PREFIX_NOTICE] if path.startswith("/api/v1/") else []
    return [*shown, *responses.ANY_ORIGIN] if b"origin" in headers else shown


async def _send_with(send: Send, headers: list[tuple[bytes, bytes]], message: Message) -> None:
    if message["type"] == "http.response.start":
        message = {**message, "headers": [*message["headers"], *headers]}
    await send(message)
