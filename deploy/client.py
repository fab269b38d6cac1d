"""The command line's client of the HTTP API, and the session of a command.

``Api`` sends plain requests; a refusal becomes ``Refused`` with one line that a person can act on, an unknown object
``Missing``. ``Session`` has the settings of a command and shows its answer; ``session`` returns it in a command.
Other commands of deploy (forwarding, reconciliation) use ``Api`` as well.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import msgspec
import typer

from aggregator.forward.polar_client import pages
from deploy.console import Output, as_json
from deploy.errors import USAGE, GiveUp
from deploy.server.data import DataDirectory, data_directory
from deploy.settings import Settings, fits_header
from meters import exact
from meters.backoff import retry_after_s

# The HTTP client.

CONNECT_TIMEOUT_S = 5.0  # a server on the same network answers sooner or not at all
ANSWER_TIMEOUT_S = 60.0  # a query over all events of a large store takes seconds, and may wait for another
BUSY_WAIT_S_MAX = 10.0  # a server that has just begun to listen answers questions a second or two later
LEFT_OUT = "Field required"  # the server's words
DETAILS_SHOWN_MAX = 10  # further refusals of one request rarely say something new


class Complaint(msgspec.Struct):
    """What is wrong with one field of a request, in the server's words; ``loc`` is the path to the field."""

    loc: list[str | int]
    msg: str = ""

    @property
    def words(self) -> str:
        """What is wrong, without the kind of error that Polar's words begin with."""
        return self.msg.removeprefix("Value error, ")


class _Refusal(msgspec.Struct):
    detail: list[Complaint]


class Refused(GiveUp):
    """The server refuses what it was sent, and says of which field."""

    def __init__(self, complaints: Sequence[tuple[str, str]], otherwise: str) -> None:
        """A complaint is a field, dotted and perhaps empty, and what is wrong with it; ``otherwise`` is for none."""
        self._complaints = complaints
        self._otherwise = otherwise
        super().__init__(self._told({}))

    def by_option(self, options: Mapping[str, str]) -> GiveUp:
        """The same as wrong usage of the options with which the fields were given."""
        return GiveUp(self._told(options), USAGE)

    def _told(self, options: Mapping[str, str]) -> str:
        lines = [
            ": ".join(filter(None, (_named(field, message, options), message))) for field, message in self._complaints
        ]
        hidden = len(lines) - DETAILS_SHOWN_MAX
        shown = lines[:DETAILS_SHOWN_MAX] + ([f"and {hidden} more"] if hidden > 0 else [])
        return "; ".join(shown) or self._otherwise


def _named(field: str, message: str, options: Mapping[str, str]) -> str:
    """The option with which a field was given; the path below it says something to who left a part of it out."""
    outer, _, inner = field.partition(".")
    if field in options or outer not in options:
        return options.get(field, field)
    return f"{options[outer]}: {inner}" if message == LEFT_OUT else options[outer]


class Missing(GiveUp):
    """The server has nothing at this path."""


@contextmanager
def blaming(options: Mapping[str, str]) -> Iterator[None]:
    """Name the option for every field that the server refuses: what is wrong is the command, and not the world."""
    try:
        yield
    except Refused as refusal:
        raise refusal.by_option(options) from None


@contextmanager
def looking_for(message: str) -> Iterator[None]:
    """Say this where the server has nothing of the id that was given, or takes it for none."""
    try:
        yield
    except (Missing, Refused):
        raise GiveUp(message, USAGE) from None


def segment(text: str, argument: str) -> str:
    """What was given for an argument, as one part of a path. Raises GiveUp.

    A part that is empty or made of dots would make the request one about something else, such as the whole customer.
    """
    if not text or {".", ".."} & set(text.split("/")):
        raise GiveUp(f"{argument} is an id, and not {text!r}", USAGE)
    return quote(text, safe="")


def header(text: str, argument: str) -> str:
    """What was given for an argument, as the value of a header. Raises GiveUp."""
    if not text or not fits_header(text):
        raise GiveUp(f"{argument} takes letters, digits and signs of ASCII, and not {text!r}", USAGE)
    return text


class Api:
    """A connection to a server's ``/v1``, with the organization's token. A context manager."""

    def __init__(self, url: str, token: str | None, socket: Path | None = None) -> None:
        """``socket`` is the aggregator's own, for whoever has its data directory; the URL then only names a host."""
        self._url, self._socket = url.rstrip("/"), socket
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self._http = http_client(self._url, socket, headers=headers, timeout=timeout, follow_redirects=True)

    def __enter__(self) -> "Api":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def send(
        self, method: str, path: str, *, params: Mapping[str, Any] | None = None, content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """One request, whatever its status. Raises httpx.TransportError when there was no answer, or GiveUp."""
        given = {name: value for name, value in (params or {}).items() if value is not None}
        head = {"Content-Type": "application/json"} if content is not None else {}
        try:
            response = self._http.request(
                method, path, params=given, content=content, headers={**head, **(headers or {})}
            )
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise GiveUp(f"--url {self._url}: {error}", USAGE) from None
        except (httpx.TooManyRedirects, httpx.DecodingError):
            raise stranger(self._url) from None
        return _ours(response)

    def answer(
        self, method: str, path: str, *, params: Mapping[str, Any] | None = None, content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:  # fmt: skip
        """The answer to a request that succeeded. Raises GiveUp.

        What only asks is asked again, for a while, of a server that says when it will answer.
        """
        until_s = time.monotonic() + (BUSY_WAIT_S_MAX if method == "GET" else 0.0)
        while True:
            try:
                response = self.send(method, path, params=params, content=content, headers=headers)
            except httpx.TransportError as error:
                raise self.unreachable(error) from None
            if response.is_success:
                return response
            wait_s = retry_after_s(response.headers.get("Retry-After"), time.time_ns() // 1000)
            if response.status_code != 503 or wait_s is None or time.monotonic() + wait_s > until_s:
                raise refused(response)
            time.sleep(wait_s)

    def get(self, path: str, **params: Any) -> Any:
        """The answer's JSON, its decimals exact. Raises GiveUp."""
        return exact.decode(self.answer("GET", path, params=params).content)

    def post(self, path: str, body: object, **params: Any) -> Any:
        """As ``get``, with a body."""
        return exact.decode(self.answer("POST", path, params=params, content=as_json(body).encode()).content)

    def patch(self, path: str, body: object) -> Any:
        """As ``post``."""
        return exact.decode(self.answer("PATCH", path, content=as_json(body).encode()).content)

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list, page by page."""
        try:
            yield from pages(self.get, path, **params)
        except (KeyError, TypeError):  # JSON, and yet no list as Meterstream gives it
            raise stranger(self._url) from None

    def unreachable(self, error: httpx.TransportError) -> GiveUp:
        """What to say when nobody answered."""
        if isinstance(error, httpx.TimeoutException):
            where = self._socket or self._url
            return GiveUp(f"{where} did not answer in time; is it overloaded, or the wrong address?")
        if self._socket is not None:
            return GiveUp(
                f"no server answers at {self._socket}; start one with `meterstream serve --data "
                f"{self._socket.parent}`, or give another --data"
            )
        return GiveUp(
            f"no server answers at {self._url}; start one with `meterstream serve`, or name it with --url "
            "(or METERSTREAM_URL)"
        )


def http_client(url: str, socket: Path | None = None, **options: Any) -> httpx.Client:
    """Whoever asks at this address. Raises GiveUp for one that is none, and for certificates that cannot be read."""
    try:
        transport = httpx.HTTPTransport(uds=str(socket)) if socket else None
        return httpx.Client(base_url=url, transport=transport, **options)
    except httpx.InvalidURL as error:
        raise GiveUp(f"--url {url}: {error}", USAGE) from None
    except (OSError, ImportError, ValueError) as error:  # httpx reads these variables, and names none of them
        raise GiveUp(f"SSL_CERT_FILE, or a variable that names a proxy, cannot be used: {error}", USAGE) from None


def _ours(response: httpx.Response) -> httpx.Response:
    """The answer, unless it is one that Meterstream never gives. Raises GiveUp."""
    kind = response.headers.get("Content-Type", "")
    if response.is_success and response.content and not kind.startswith("application/"):
        raise stranger(str(response.request.url.copy_with(path="/", query=None)))
    return response


def stranger(url: str) -> GiveUp:
    """What to say where somebody else answers."""
    return GiveUp(f"what answers at {url} is not Meterstream; name a server with --url (or METERSTREAM_URL)")


def refused(response: httpx.Response) -> GiveUp:
    """What to say about an answer that is not a success, and what to do about it."""
    match response.status_code:
        case 401:
            return GiveUp(
                "the server does not accept this token; give one with --token (or METERSTREAM_TOKEN), "
                "or make one with `meterstream tokens create`"
            )
        case 403:
            return GiveUp(f"this token may not do that: {_first_line(response)}; `meterstream tokens create` makes one")
        case 404:
            return Missing(f"not found: {response.request.url.path}")
        case 422:
            found = [(".".join(map(str, one.loc[1:])), one.words) for one in complaints(response)]
            return Refused(found, _first_line(response))
        case 429:
            wait = response.headers.get("Retry-After", "a few")
            return GiveUp(f"this token's requests are limited; there is room again in {wait} s")
        case 503:
            wait = response.headers.get("Retry-After", "a few")
            return GiveUp(f"the server is busy or still starting; try again in {wait} s")
        case status:
            return GiveUp(f"the server answered {status}: {_first_line(response)}")


def complaints(response: httpx.Response) -> list[Complaint]:
    """Return the complaints of a 422; none where the answer cannot be read."""
    try:
        return msgspec.json.decode(response.content, type=_Refusal).detail
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return []


def _first_line(response: httpx.Response) -> str:
    """The answer's own words, or its status where it has none."""
    try:
        body = response.json()
        return str(body.get("error_description") or body.get("detail") or body.get("error") or body)
    except (ValueError, AttributeError):
        return (response.text.strip().splitlines() or [response.reason_phrase])[0][:200]


# The session.

if TYPE_CHECKING:
    pass

EPILOG = (
    "Every command takes --url, --token, --data and --log (or METERSTREAM_URL, _TOKEN, _DATA, _LOG), and --output, "
    "anywhere."
)


class Session(msgspec.Struct, frozen=True):
    """One run of the command line."""

    settings: Settings
    output: Output

    def api(self) -> "Api":
        """A client of the running server. Raises GiveUp when there is no token to show."""
        if not self.settings.token:
            raise GiveUp(
                "a token is needed: --token, or METERSTREAM_TOKEN; `meterstream serve` prints one on its first start "
                "and `meterstream tokens create` makes more", USAGE,
            )

        return Api(self.settings.url, self.settings.token)

    @property
    def data(self) -> DataDirectory:
        """The files of the installation on this machine."""
        return data_directory(self.settings)


def session(context: typer.Context, *, page: bool = False) -> Session:
    """The session that the command line put into the context. Raises GiveUp for a page where there is none."""
    found = context.obj
    assert isinstance(found, Session)
    if found.output is Output.html and not page:
        raise GiveUp("--output html is for `meterstream reconcile`; here it is table, json or csv", USAGE)
    return found
