"""Connections that are lent: a client sees one server, whichever process answers, and whatever becomes of either."""

import json
import os
import random
import signal
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from aggregator.api.borrowed import SILENT_S
from ingest.lending import READS_BEFORE
from tests.support.servers.installation import Installation
from tests.support.waiting import eventually

SEED = int(os.environ.get("LENDING_SEED", "20261124"))
ROUNDS = 150
Answer = tuple[int, dict[str, str], bytes]


class Place:
    """A server with a meter and a customer, and what a client needs to ask for a balance."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.meter = installation.answer("meters", "create", "--name", "calls", "--count")["id"]
        self.host, self.port = urlsplit(installation.url).hostname or "", urlsplit(installation.url).port or 0
        self.total = f"/v1/meters/{self.meter}/usage?external_customer_id=ada"

    def head(self, method: str, path: str, *more: str, token: str = "") -> bytes:
        """The bytes of a request's head."""
        authorization = f"authorization: Bearer {token or self.installation.token}"
        return "\r\n".join([f"{method} {path} HTTP/1.1", "host: t", authorization, *more, "", ""]).encode()

    def read(self) -> bytes:
        """A read that is answered from memory."""
        return self.head("GET", self.total)

    def event(self, number: int) -> bytes:
        """A request with one event."""
        event = {"name": "call", "external_customer_id": "ada", "external_id": str(number)}
        body = json.dumps({"events": [event]})
        return self.head("POST", "/v1/events/ingest", f"content-length: {len(body)}") + body.encode()

    def metric(self, name: str) -> int:
        """One number of ``/metrics``."""

        def found() -> list[int]:
            lines = self.installation.get("/metrics").text.splitlines()
            return [int(float(line.split()[1])) for line in lines if line.startswith(f"{name} ")]

        return int(eventually(found)[0])  # the aggregator's are left out where it does not answer in time

    def borrowed(self) -> int:
        """Connections that the aggregator has."""
        return self.metric("meterstream_borrowed_connections")


class Client:
    """One connection."""

    def __init__(self, place: Place) -> None:
        self.socket = socket.create_connection((place.host, place.port), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = self.socket.makefile("rb")

    def ask(self, *pieces: bytes) -> Answer:
        """Send, and read one answer."""
        for piece in pieces:
            self.socket.sendall(piece)
        return self.answer()

    def answer(self) -> Answer:
        """The next answer. Raises ConnectionError when there is none."""
        first = self._reader.readline()
        if not first:
            raise ConnectionResetError
        headers = {}
        while (line := self._reader.readline().strip()) != b"":
            name, _, value = line.decode().partition(": ")
            assert name not in headers, line
            headers[name] = value
        return int(first.split()[1]), headers, self._reader.read(int(headers["content-length"]))

    def read_until_lent(self, place: Place) -> Answer:
        """Read so often that the connection, a new one, is lent; the last answer."""
        lent = place.metric("meterstream_gateway_connections_lent_total")
        while place.metric("meterstream_gateway_connections_lent_total") == lent:
            for _ in range(READS_BEFORE):
                self.ask(place.read())
        return self.ask(place.read())

    def close(self) -> None:
        """Hang up."""
        self._reader.close()
        self.socket.close()


@pytest.fixture(scope="module")
def place(running: Installation) -> Place:
    """What the tests share that stop nothing."""
    return Place(running)


@pytest.fixture
def client(place: Place) -> Iterator[Client]:
    """A connection to it."""
    found = Client(place)
    yield found
    found.close()


def test_a_reader_is_answered_without_the_gateway_and_sees_no_difference(place: Place, client: Client) -> None:
    """The same status, headers and body, and the gateway passes nothing on meanwhile."""
    status, headers, body = client.ask(place.read())
    assert (status, set(json.loads(body)) >= {"value"}) == (200, True)
    client.read_until_lent(place)
    reads = place.metric("meterstream_borrowed_reads_total")

    lent_status, lent_headers, lent_body = client.ask(place.read())

    assert place.metric("meterstream_borrowed_reads_total") > reads
    assert (lent_status, lent_body) == (status, body)
    assert lent_headers | {"date": ""} == headers | {"date": ""}


def test_an_event_on_a_lent_connection_is_taken_and_then_read(place: Place, client: Client) -> None:
    """The connection goes back with the whole request, body and all."""
    before = int(json.loads(client.read_until_lent(place)[2])["value"])

    status, headers, body = client.ask(place.event(-1))

    assert (status, json.loads(body)["inserted"]) == (200, 1)
    position = headers["log-position"]
    waiting = place.head("GET", place.total, f"log-position: {position}", "prefer: wait=60")
    assert json.loads(client.ask(waiting)[2])["value"] == str(before + 1)


@pytest.mark.parametrize(("request_", "status"), [
    (b"GET /v1/events/names HTTP/1.1\r\nhost: t\r\n\r\n", 401),
    (b"GET /livez HTTP/1.1\r\nhost: t\r\n\r\n", 200),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"no HTTP at all\r\n\r\n", 400),
    (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: t\r\n\r\n", 431),
    (b"GET / HTTP/1.1\r\nhost: t\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
    (b"POST /v1/events/ingest HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n", 411),
])  # fmt: skip
def test_what_a_gateway_would_say_it_still_says(place: Place, client: Client, request_: bytes, status: int) -> None:
    """Refusals, its own pages, and what is no request."""
    client.read_until_lent(place)
    assert client.ask(request_)[0] == status


def test_a_token_that_is_revoked_ends_the_reads(place: Place, client: Client) -> None:
    """At once: it is looked up for every read."""
    made = place.installation.answer("tokens", "create", "--name", "short")
    asking = place.head("GET", place.total, token=made["token"])
    other = Client(place)
    eventually(lambda: other.ask(asking)[0] == 200)
    other.close()
    client.read_until_lent(place)
    assert client.ask(asking)[0] == 200
    place.installation.run("tokens", "revoke", made["id"])
    eventually(lambda: client.ask(asking)[0] == 401)


def test_a_silent_connection_goes_back_and_stays_open(place: Place, client: Client) -> None:
    """The gateway's own deadline for silence begins then."""
    client.read_until_lent(place)
    eventually(lambda: place.borrowed() == 0, patience_s=SILENT_S + 60)
    assert client.ask(place.read())[0] == 200


def test_a_client_that_hangs_up_leaves_nothing_behind(place: Place) -> None:
    """No descriptor stays in either process."""
    clients = [Client(place) for _ in range(20)]
    for client in clients:
        client.read_until_lent(place)
    open_before = _descriptors(place)
    for client in clients:
        client.close()
    eventually(lambda: place.borrowed() == 0)
    eventually(lambda: _descriptors(place) <= open_before - len(clients))


def _descriptors(place: Place) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in place.installation.children().values())


def test_whatever_comes_each_request_has_its_own_answer(place: Place) -> None:
    """Random requests, in random pieces, alone or together, on connections that come and go between the processes."""
    chance = random.Random(SEED)
    reads = place.metric("meterstream_borrowed_reads_total")
    kinds = {
        place.read(): 200,
        place.head("GET", place.total, "polar-version: 2026-04"): 200,
        place.head("GET", "/v1/meters/"): 200,
        place.head("GET", place.total, token="polar_oat_wrong"): 401,
        place.head("GET", "/nowhere"): 404,
        place.head("POST", "/v1/events/ingest", "content-length: 2") + b"{}": 422,
    }
    for round_ in range(ROUNDS):
        client = Client(place)
        for _ in range(READS_BEFORE + chance.choice([-2, 0, 3])):
            assert client.ask(place.read())[0] == 200
        for step in range(chance.randrange(1, 6)):
            asked = [
                chance.choice([*kinds, place.event(100 * round_ + step)]) for _ in range(chance.choice([1, 1, 1, 2, 3]))
            ]
            data = b"".join(asked)
            cuts = sorted(chance.sample(range(1, len(data)), chance.choice([0, 0, 1, 2])))
            first = client.ask(*(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)))
            answers = [first, *(client.answer() for _ in asked[1:])]
            assert [answer[0] for answer in answers] == [kinds.get(one, 200) for one in asked], (SEED, round_, asked)
        client.close()
    assert place.metric("meterstream_borrowed_reads_total") > reads + ROUNDS


def test_a_stopping_aggregator_gives_connections_back(installation: Installation) -> None:
    """The client's next read is answered on the same connection: 503 while nobody can, then 200."""
    installation.start()
    place = Place(installation)
    clients = [Client(place) for _ in range(8)]
    for client in clients:
        client.read_until_lent(place)

    aggregator = installation.children()["aggregate"]
    os.kill(aggregator, signal.SIGTERM)

    eventually(lambda: installation.children().get("aggregate", aggregator) != aggregator)
    for client in clients:
        eventually(lambda client=client: client.ask(place.read())[0] == 200)
        client.close()


def _answers(installation: Installation) -> bool:
    """Whether reads are answered; a connection of before may be found broken only now."""
    try:
        return installation.get("/v1/meters/").status_code == 200
    except httpx.TransportError:
        return False


def test_a_killed_process_takes_no_more_than_its_connections(installation: Installation) -> None:
    """Whichever it was: the connection ends, events are taken, and a new connection is lent as before."""
    installation.start()
    place = Place(installation)
    for number, victim in enumerate(("aggregate", "gateway")):
        client = Client(place)
        client.read_until_lent(place)

        os.kill(installation.children()[victim], signal.SIGKILL)

        assert client.socket.recv(1) == b""
        client.close()
        eventually(lambda: _answers(installation))
        with_events = Client(place)
        assert with_events.ask(place.event(number))[0] == 200
        with_events.close()
        another = Client(place)
        assert another.read_until_lent(place)[0] == 200
        another.close()
        eventually(lambda: place.borrowed() == 0)
