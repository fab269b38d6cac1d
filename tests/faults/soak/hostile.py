"""Clients that mean no good. Each gets a refusal or a closed connection; a yes to any of them fails the soak."""

import contextlib
import gzip
import json
import random
import re
import socket
import time
from collections.abc import Callable

WAIT_S = 5.0  # for an answer; that none came is allowed
SOCKETS = 200
BOMB_BYTES = 200 << 20  # twenty times what a body may be unpacked
LONG_HEAD_BYTES = 1 << 20


class Hostile:
    """Attacks on one gateway. Each returns the statuses that it was answered with."""

    def __init__(self, port: int, token: str, choose: random.Random) -> None:
        self._port, self._choose = port, choose
        self._head = f"POST /v1/events/ingest HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n"

    def slow_clients(self, strength: float) -> list[int]:
        """Heads that do not end, over many connections, for a while."""
        with contextlib.ExitStack() as held:
            for _ in range(int(SOCKETS * strength) + 1):
                with contextlib.suppress(OSError):
                    connection = held.enter_context(self._connect())
                    connection.sendall(self._head.encode())
            time.sleep(1 + 4 * strength)  # that long they stay
        return []

    def long_heads(self, strength: float) -> list[int]:
        """A megabyte of headers."""
        filler = b"x: " + b"a" * (LONG_HEAD_BYTES // 32) + b"\r\n"
        return self._each(int(20 * strength) + 1, lambda: self._head.encode() + filler * 32 + b"\r\n")

    def garbage(self, strength: float) -> list[int]:
        """Random bytes, some behind a proper beginning."""

        def made() -> bytes:
            head = self._head.encode()
            beginning = self._choose.choice([b"", b"GET ", head, head + b"content-length"])
            return beginning + self._choose.randbytes(self._choose.randrange(1, 5000)) + b"\r\n\r\n"

        return self._each(int(100 * strength) + 1, made)

    def bombs(self, strength: float) -> list[int]:
        """Small bodies that would unpack to far more than is allowed."""
        packed = gzip.compress(bytes(BOMB_BYTES), 1)
        return self._each(int(3 * strength) + 1, lambda: self._posted(packed, "content-encoding: gzip\r\n"))

    def bad_bodies(self, strength: float) -> list[int]:
        """One event that is none among good ones: all or nothing, so nothing."""
        good: dict[str, object] = {"name": "call", "external_customer_id": "customer-0000", "metadata": {"tokens": 1}}
        bad: list[dict[str, object]] = [
            {"name": 5}, {"name": None}, {"metadata": {"a": float("nan")}}, {"timestamp": "2999-01-01T00:00:00Z"},
        ]

        def made() -> bytes:
            events = [good | {"external_id": f"soak-9{number:011d}"} for number in range(20)]
            events.insert(self._choose.randrange(20), good | self._choose.choice(bad))
            return self._posted(json.dumps({"events": events}).encode())

        return self._each(int(50 * strength) + 1, made)

    def _posted(self, body: bytes, headers: str = "") -> bytes:
        return f"{self._head}{headers}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body

    def _each(self, times: int, made: Callable[[], bytes]) -> list[int]:
        return [status for _ in range(times) for status in self._exchange(made())]

    def _exchange(self, data: bytes) -> list[int]:
        received = b""
        with contextlib.suppress(OSError), self._connect() as connection:  # cut while it was sent is fine
            connection.sendall(data)
            while piece := connection.recv(65536):
                received += piece
        return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=WAIT_S)
