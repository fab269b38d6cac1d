"""Reads through a server: the query API's answers, on connections that carry everything else, too."""

import json
import os
import random
import signal
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.servers.installation import Installation
from tests.support.waiting import eventually

SEED = int(os.environ.get("READS_SEED", "20261124"))
ROUNDS = 150
SOME_READS = 16
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

    def read_often(self, place: Place) -> Answer:
        """Ask for the same total many times; the last answer."""
        answers = [self.ask(place.read()) for _ in range(SOME_READS)]
        assert {answer[0] for answer in answers} == {200}
        return answers[-1]

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


def test_the_gateway_passes_on_what_the_query_api_answers(place: Place, client: Client) -> None:
    """The same status, headers and body as at the aggregator's own socket; the gateway adds the API's version."""
    status, headers, body = client.read_often(place)

    transport = httpx.HTTPTransport(uds=str(place.installation.data / "api.sock"))
    with httpx.Client(transport=transport, headers={"authorization": f"Bearer {place.installation.token}"}) as api:
        direct = api.get(f"http://aggregator{place.total}")

    assert (status, body) == (direct.status_code, direct.content)
    assert set(json.loads(body)) >= {"value"}
    assert headers.pop("polar-version")
    assert headers | {"date": ""} == dict(direct.headers) | {"date": ""}


def test_an_event_between_reads_is_taken_and_then_read(place: Place, client: Client) -> None:
    """On the same connection: a read that names the event's position has it."""
    before = int(json.loads(client.read_often(place)[2])["value"])

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
def test_a_connection_of_reads_has_the_gateways_rules(
    place: Place, client: Client, request_: bytes, status: int
) -> None:
    """Refusals, its own pages, and what is no request."""
    client.read_often(place)
    assert client.ask(request_)[0] == status


def test_a_token_that_is_revoked_ends_the_reads(place: Place, client: Client) -> None:
    """At once: it is looked up for every read."""
    made = place.installation.answer("tokens", "create", "--name", "short")
    asking = place.head("GET", place.total, token=made["token"])
    eventually(lambda: client.ask(asking)[0] == 200)
    place.installation.run("tokens", "revoke", made["id"])
    eventually(lambda: client.ask(asking)[0] == 401)
    assert client.ask(place.read())[0] == 200


def test_clients_that_hang_up_leave_nothing_behind(place: Place) -> None:
    """No descriptor stays in any process."""
    clients = [Client(place) for _ in range(20)]
    for client in clients:
        client.read_often(place)
    open_before = _descriptors(place)
    for client in clients:
        client.close()
    eventually(lambda: _descriptors(place) <= open_before - len(clients))


def _descriptors(place: Place) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in place.installation.children().values())


def test_whatever_comes_each_request_has_its_own_answer(place: Place) -> None:
    """Random requests of every kind, in random pieces, alone or together, on one connection after another."""
    chance = random.Random(SEED)
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_connections_outlive_the_aggregator(installation: Installation, number: signal.Signals) -> None:
    """Reads are answered with 503 while no aggregator runs, then with 200 on the same connection, and events always."""
    installation.start()
    place = Place(installation)
    clients = [Client(place) for _ in range(8)]
    for client in clients:
        client.read_often(place)

    aggregator = installation.children()["aggregate"]
    os.kill(aggregator, number)

    assert clients[0].ask(place.event(1))[0] == 200
    eventually(lambda: installation.children().get("aggregate", aggregator) != aggregator)
    for client in clients:
        statuses = _statuses_until_200(client, place)
        assert set(statuses) <= {200, 503}
        client.close()


def _statuses_until_200(client: Client, place: Place) -> list[int]:
    statuses = list[int]()

    def answered() -> bool:
        statuses.append(client.ask(place.read())[0])
        return statuses[-1] == 200

    eventually(answered)
    return statuses
