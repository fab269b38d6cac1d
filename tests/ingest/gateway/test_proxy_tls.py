"""A query API at an https address: reads carry tokens, so nothing is said to whoever is not known to be it."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingest.gateway import proxy
from tests.support.certificates import make_certificate
from tests.support.servers.gateway import PATIENCE_S, RunningGateway

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class TlsApi:
    """A query API that speaks TLS with a certificate of its own, and answers everything with ``ok``."""

    def __init__(self, folder: Path) -> None:
        self.certificate, key = make_certificate(folder, "api", reached_as="IP:127.0.0.1")
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(self.certificate, key)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.asked: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, name="tls-api")

    def __enter__(self) -> "TlsApi":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # the end of the listener
            while True:
                self._answer(self._listener.accept()[0])

    def _answer(self, plain: socket.socket) -> None:
        plain.settimeout(PATIENCE_S)
        with contextlib.suppress(OSError), plain, self._tls.wrap_socket(plain, server_side=True) as connection:
            while asked := connection.recv(65536):
                self.asked.append(asked)
                connection.sendall(ANSWER)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[TlsApi]:
    """An API whose certificate nobody knows yet."""
    with TlsApi(tmp_path) as running:
        yield running


def test_reads_are_asked_over_tls(api: TlsApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the certificate is of a known authority; without a port it is that of https."""
    monkeypatch.setenv("SSL_CERT_FILE", str(api.certificate))
    monkeypatch.setitem(proxy.PORTS, "https", api.port)
    with RunningGateway(upstream="https://127.0.0.1") as gateway:
        answers = [gateway.client.get("/v1/meters/", headers=gateway.authorization) for _ in range(2)]
    assert [answer.content for answer in answers] == [b"ok", b"ok"]
    assert all(gateway.secret.encode() in asked for asked in api.asked)


def test_nobody_unknown_is_asked(api: TlsApi, caplog: pytest.LogCaptureFixture) -> None:
    """A certificate of an unknown authority: 503, no token leaves, and the log says once why and what to do."""
    with RunningGateway(upstream=f"https://127.0.0.1:{api.port}") as gateway:
        statuses = [gateway.client.get("/v1/meters/", headers=gateway.authorization).status_code for _ in range(2)]
    assert (statuses, api.asked) == ([503, 503], [])
    [said] = [record.getMessage() for record in caplog.records if record.name == "ingest.passthrough"]
    assert "certificate verify failed" in said
    assert "SSL_CERT_FILE" in said
