"""The reverse proxy that is shipped, run for real: one address, in front of gateways and the query API."""

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from ingest.gateway.app import VERSIONS
from meters.catalogue.access import API_VERSION_DEFAULT
from tests.support.ports import take_port
from tests.support.programs import program
from tests.support.servers.installation import Installation
from tests.support.waiting import eventually

SHIPPED = Path(__file__).resolve().parents[3] / "deploy" / "proxy" / "meterstream.conf"
REPLACED = "meterstream_aggregator;"  # in the map of reads: what shipped.md replaces to send them through a gateway
GATEWAY = "server gateway:8000 max_fails=2 fail_timeout=5s;"
FOR_READS = "server gateway:8000 max_fails=0;"
AGGREGATOR = "server aggregator:8000 max_fails=0;"
LISTEN = "listen 8080;"
# One process, that writes to a directory of its own alone.
MAIN = """
daemon off; master_process off; pid {0}/nginx.pid; error_log {0}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {0}/body; proxy_temp_path {0}/proxy; fastcgi_temp_path {0}/fastcgi;
    uwsgi_temp_path {0}/uwsgi; scgi_temp_path {0}/scgi;
    include {0}/meterstream.conf;
}}
"""
EVENT = {"name": "call", "external_customer_id": "proxied", "metadata": {"n": 1}}
PORTAL = "/v1/customer-portal/meters/"
PAGE = {"origin": "https://shop.example.com"}
PREFLIGHT = PAGE | {"access-control-request-method": "GET", "access-control-request-headers": "authorization"}


@contextlib.contextmanager
def proxy(directory: Path, gateways: list[str], aggregator: str, shipped_text: str = "") -> Iterator[str]:
    """nginx with the shipped configuration, or a changed one, in front of these servers; its address."""
    port, text = take_port(), shipped_text or SHIPPED.read_text()
    for shipped, here in (
        (GATEWAY, " ".join(f"server {gateway} max_fails=2 fail_timeout=5s;" for gateway in gateways)),
        (FOR_READS, " ".join(f"server {gateway} max_fails=0;" for gateway in gateways)),
        (AGGREGATOR, f"server {aggregator} max_fails=0;"),
        (LISTEN, f"listen 127.0.0.1:{port};"),
    ):
        assert text.count(shipped) == 1
        text = text.replace(shipped, here)
    (directory / "meterstream.conf").write_text(text)
    (directory / "nginx.conf").write_text(MAIN.format(directory))
    command = [program("nginx", "nginx-light"), "-p", str(directory), "-c", str(directory / "nginx.conf")]
    with (directory / "output").open("w") as output, subprocess.Popen([*command, "-e", str(directory / "error.log")],
                                                                      stdout=output, stderr=output) as nginx:
        try:
            eventually(lambda: _listens(port) or nginx.poll() is not None)
            assert nginx.poll() is None, (directory / "error.log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            nginx.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def through(running: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a proxy whose first gateway is down; reads go to the aggregator's own socket."""
    directory = tmp_path_factory.mktemp("proxy")
    gateways = [f"127.0.0.1:{take_port()}", running.url.removeprefix("http://")]
    headers = {"authorization": f"Bearer {running.token}"}
    with (
        proxy(directory, gateways, f"unix:{os.path.realpath(running.data)}/api.sock") as url,
        httpx.Client(base_url=url, headers=headers, timeout=30) as client,
    ):
        yield client


def passed_on(running: Installation) -> int:
    """How many requests the gateway passed on to the query API."""
    lines = running.get("/metrics").text.splitlines()
    return sum(int(float(line.split()[1])) for line in lines if line.startswith("meterstream_gateway_passed_on_total"))


def test_an_event_goes_in_and_is_read_back_at_one_address(through: httpx.Client, running: Installation) -> None:
    """Events reach a gateway that lives, reads the aggregator without a gateway, and the position holds for both."""
    before = passed_on(running)
    written = through.post("/v1/events/ingest", json={"events": [EVENT | {"external_id": "through"}]})
    position = {"prefer": "wait=20", "log-position": written.headers["log-position"]}
    read = through.get("/v1/events/", params={"external_customer_id": "proxied"}, headers=position)

    assert written.json() == {"inserted": 1, "duplicates": 0}
    assert [item["name"] for item in read.json()["items"]] == ["call"]
    assert passed_on(running) == before


@pytest.mark.parametrize("path", ["/v1/events/ingest", "/v1/events/ingest/", "/api/v1/events/ingest"])
def test_every_spelling_of_ingestion_reaches_a_gateway(through: httpx.Client, path: str) -> None:
    """Each is answered as the gateway itself does, with the position in the log."""
    answer = through.post(path, json={"events": []})

    assert answer.status_code == 200
    assert "log-position" in answer.headers
    assert ("x-polar-deprecation-notice" in answer.headers) == path.startswith("/api/")


def test_old_paths_of_reads_still_work(through: httpx.Client) -> None:
    """A gateway knows them, so they go through one."""
    answer = through.get("/api/v1/meters/")

    assert answer.status_code == 200
    assert "x-polar-deprecation-notice" in answer.headers


@pytest.mark.parametrize("version", [None, *sorted(VERSIONS)])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_every_answer_names_its_version_once(through: httpx.Client, method: str, version: bytes | None) -> None:
    """Whoever answers, the header stands there once and says what was asked for."""
    headers = {} if version is None else {"polar-version": version.decode()}
    path = "/v1/meters/" if method == "GET" else "/v1/events/ingest"
    answer = through.request(method, path, json={"events": []} if method == "POST" else None, headers=headers)

    assert answer.status_code == 200
    assert answer.headers.get_list("polar-version") == [(version or API_VERSION_DEFAULT).decode()]


@pytest.mark.parametrize("path", [PORTAL, "/v1/meters/", "/v1/events/ingest"])
def test_a_browser_is_told_that_its_page_may_ask(through: httpx.Client, path: str) -> None:
    """The question before the request, which has no token, is answered as by a gateway, whatever it is about."""
    answer = through.request("OPTIONS", path, headers=PREFLIGHT)

    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "Authorization" in answer.headers["access-control-allow-headers"]
    assert answer.headers.get_list("polar-version") == [API_VERSION_DEFAULT.decode()]


@pytest.mark.parametrize("version", [None, *sorted(VERSIONS)])
def test_a_page_may_read_what_it_asked_for(through: httpx.Client, version: bytes | None) -> None:
    """A customer's own meters, with the headers without which a browser shows a page nothing; refusals, too."""
    versioned = PAGE | ({} if version is None else {"polar-version": version.decode()})
    customer = through.post("/v1/customers/", json={"email": f"{version!r}@example.com"}).json()["id"]
    session = through.post("/v1/customer-sessions/", json={"customer_id": customer}).json()["token"]
    answer = through.get(PORTAL, headers=versioned | {"authorization": f"Bearer {session}"})
    refused = through.get(PORTAL, headers=versioned | {"authorization": "Bearer nobody's"})

    assert (answer.status_code, refused.status_code) == (200, 401)
    for each in (answer, refused):
        assert each.headers.get_list("access-control-allow-origin") == ["*"]
        assert each.headers.get_list("polar-version") == [(version or API_VERSION_DEFAULT).decode()]


def test_all_reads_can_be_sent_through_a_gateway(running: Installation, tmp_path: Path) -> None:
    """As shipped.md says, with two words of the shipped file changed: each is passed on, without another way there."""
    assert SHIPPED.read_text().count(REPLACED) == 2
    changed = SHIPPED.read_text().replace(REPLACED, "meterstream_gateways_for_reads;")
    headers = {"authorization": f"Bearer {running.token}"}
    before = passed_on(running)
    with proxy(tmp_path, [running.url.removeprefix("http://")], f"127.0.0.1:{take_port()}", changed) as url:
        for version in ({}, {"polar-version": API_VERSION_DEFAULT.decode()}):
            assert httpx.get(f"{url}/v1/meters/", headers=headers | version, timeout=30).status_code == 200

    assert passed_on(running) == before + 2


def test_an_unknown_version_is_refused_as_by_a_gateway(through: httpx.Client) -> None:
    """It is no version of the API, so there is nothing at that address."""
    answer = through.get("/v1/meters/", headers={"polar-version": "1999-01"})

    assert answer.status_code == 404
    assert answer.json() == {"detail": "Not Found"}


def test_a_body_that_is_too_large_is_refused_by_the_gateway(through: httpx.Client) -> None:
    """The refusal has Polar's shape, not nginx's page."""
    answer = through.post("/v1/events/ingest", content=b"x" * (10 * 1024 * 1024 + 1))

    assert answer.status_code == 413
    assert answer.json()["error"] == "RequestBodyTooLarge"


def test_a_body_of_unknown_length_is_taken(through: httpx.Client) -> None:
    """A gateway wants to know the length; the proxy collects the chunks and tells it."""
    chunks = iter([b'{"events":', b"[]}"])
    answer = through.post("/v1/events/ingest", content=chunks, headers={"content-type": "application/json"})

    assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/readyz", "/livez"])
def test_what_speaks_of_one_process_is_not_public(through: httpx.Client, path: str) -> None:
    """Behind one address it would speak of whichever process happened to answer."""
    assert through.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/v1/events/ingest", "/v1/meters/"])
def test_nobody_behind_the_proxy_is_a_reason_to_come_back(tmp_path: Path, path: str) -> None:
    """When no server can be reached the answer is 503 with Retry-After, as JSON."""
    with proxy(tmp_path, [f"127.0.0.1:{take_port()}"], f"127.0.0.1:{take_port()}") as url:
        answer = httpx.post(url + path, json={"events": []}, timeout=60)

    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"] == "ServiceUnavailable"


class _SlowReads(BaseHTTPRequestHandler):
    """A gateway in front of an aggregator that hangs: it takes events, and answers no read."""

    protocol_version = "HTTP/1.1"
    over = threading.Event()

    def do_GET(self) -> None:
        """Nothing, until the test is over."""
        self.over.wait(30)

    def do_POST(self) -> None:
        """Taken."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Silence."""


def test_reads_that_hang_do_not_keep_events_out(tmp_path: Path) -> None:
    """Gateways that wait for the aggregator in vain are not taken for dead by those who send events."""
    impatient = SHIPPED.read_text().replace("proxy_read_timeout 65s;", "proxy_read_timeout 1s;")
    gateways = [ThreadingHTTPServer(("127.0.0.1", 0), _SlowReads) for _ in range(2)]
    addresses = [f"127.0.0.1:{gateway.server_port}" for gateway in gateways]
    for gateway in gateways:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
    try:
        with (
            proxy(tmp_path, addresses, "127.0.0.1:1", impatient) as url,
            httpx.Client(base_url=url, timeout=30) as client,
            ThreadPoolExecutor(8) as pool,
        ):
            reads = list(pool.map(lambda _: client.get("/v1/meters/", headers=PAGE).status_code, range(8)))
            sent = [client.post("/v1/events/ingest", json={"events": []}).status_code for _ in range(8)]
    finally:
        _SlowReads.over.set()
        for gateway in gateways:
            gateway.shutdown()
            gateway.server_close()

    assert impatient != SHIPPED.read_text()
    assert (set(reads), set(sent)) == ({503}, {200})
