"""A gateway in this process, on a real socket, with a real log; and what a test needs to speak to it."""

import asyncio
import contextlib
import socket
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import httpx

from ingest.gateway.app import Gateway
from ingest.gateway.server import GatewayServer, ServerSettings
from ingest.log import open_log
from meters.catalogue.access import TOKEN_PREFIX, digest
from meters.catalogue.catalogue import (
    SESSION_LIFE,
    SESSION_PREFIX,
    Change,
    Customer,
    CustomerCreated,
    CustomerSession,
    CustomerSessionCreated,
    Organization,
    OrganizationCreated,
    Token,
    TokenCreated,
    TokenRevoked,
    encode_change,
)
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log, Record
from tests.support.waiting import eventually

PATIENCE_S = 30.0
"""Seconds for an answer, or for an end; far more than either takes."""

CREATED = datetime(2026, 1, 1, tzinfo=UTC)


class RunningGateway:
    """A gateway on a free port, ready when a test begins, unless ``is_ready`` says that it cannot be.

    Its first organization has a token that may send events.
    """

    def __init__(self, log: Log | None = None, *, is_ready: bool = True, **settings: Any) -> None:
        self._is_ready = is_ready
        self.log = log or open_log("memory:")
        self.organization_id = str(uuid.uuid4())
        self.secret = TOKEN_PREFIX + uuid.uuid4().hex
        self.token = self.make_token(self.secret, ["events:write"])
        self.decide(OrganizationCreated(Organization(self.organization_id, "Acme", CREATED)), TokenCreated(self.token))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.settings = ServerSettings(**settings)
        self.gateway = Gateway(self.log, self.settings)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE_S)
        self.server = GatewayServer(self.gateway, self.settings)
        self._thread = threading.Thread(target=self.server.run, args=([self._socket],), name="gateway")

    def __enter__(self) -> "RunningGateway":
        self._thread.start()
        eventually(lambda: self.server.started)
        if self._is_ready:  # one that is started may still wait for its tokens, or for the log's partitions
            eventually(lambda: self.gateway.tail.current and self.gateway.endpoint.intake.writable)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self.server.should_exit = True
        self._thread.join(PATIENCE_S)
        self._socket.close()
        self.log.close()
        assert not self._thread.is_alive()

    @property
    def is_running(self) -> bool:
        """Whether the server has not ended yet."""
        return self._thread.is_alive()

    @property
    def authorization(self) -> dict[str, str]:
        """The header of the first token."""
        return {"authorization": f"Bearer {self.secret}"}

    def make_token(self, secret: str, scopes: list[str], expires_at: datetime | None = None) -> Token:
        """A token of the organization, not decided yet."""
        return Token(
            id=str(uuid.uuid4()), organization_id=self.organization_id, name="a token", sha256=digest(secret),
            scopes=scopes, created_at=CREATED, expires_at=expires_at,
        )

    def decide(self, *changes: Change) -> None:
        """Write decisions to the control stream, as the aggregator does."""
        entries = [Entry(encode_change(change)) for change in changes]
        asyncio.run(self.log.append(USAGE_CONTROL, entries))

    def revoke(self, token: Token) -> None:
        """Write that the token is good no longer."""
        self.decide(TokenRevoked(token.id, datetime.now(UTC)))

    def add_customer(self, **fields: Any) -> Customer:
        """A customer that the gateway has heard of when this returns."""
        customer = Customer(
            id=str(uuid.uuid4()), organization_id=self.organization_id, created_at=CREATED, **fields
        )
        self.decide(CustomerCreated(customer))
        eventually(lambda: customer.id in self.gateway.tail.catalogue.customers)
        return customer

    def add_session(self) -> str:
        """The secret of a customer's session that the gateway has heard of when this returns."""
        customer, secret, now = self.add_customer(), SESSION_PREFIX + uuid.uuid4().hex, datetime.now(UTC)
        session = CustomerSession(
            id=str(uuid.uuid4()), organization_id=self.organization_id, customer_id=customer.id, sha256=digest(secret),
            created_at=now, expires_at=now + SESSION_LIFE,
        )
        self.decide(CustomerSessionCreated(session))
        eventually(lambda: self.gateway.tail.catalogue.sessions.find(session.sha256, now))
        return secret

    def ingest(self, body: Any = None, *, content: bytes | None = None, **headers: str) -> httpx.Response:
        """Post events with the first token. Underscores in names of headers stand for hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post("/v1/events/ingest", json=body, content=content, headers=self.authorization | named)

    def records(self) -> list[Record]:
        """Every record of the events' stream."""
        return self.log.read(USAGE_EVENTS, {0: 0}, bytes_max=1 << 30)

    def lines(self) -> list[bytes]:
        """Every line of the events' stream."""
        return [line for record in self.records() for line in record.value.split(b"\n")]

    @contextlib.contextmanager
    def connect(self) -> Iterator[socket.socket]:
        """A plain socket to the gateway."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as connection:
            yield connection


def event(**fields: Any) -> dict[str, Any]:
    """A good event, with other fields on top."""
    return {"name": "call", "external_customer_id": "user-1"} | fields


def receive_all(connection: socket.socket) -> bytes:
    """Everything until the other side closes; what came before a reset counts."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            received += chunk
    return received
