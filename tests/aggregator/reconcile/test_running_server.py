"""Reconciliation beside a running server: over its socket, over its address, and after it was killed."""

import asyncio
import contextlib
import itertools
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import msgspec
import pytest

from aggregator.reconcile.report import Cause, Worth
from aggregator.reconcile.store_check import check_store
from aggregator.store.queries.audit import Which
from aggregator.totals.running import RunningTotals
from deploy.client import Api, Session
from deploy.console import Output
from deploy.errors import GiveUp
from deploy.reconcile import local as its_module
from deploy.reconcile.local import RunningStore, Task, own_server, reconcile
from deploy.reconcile.run import prove
from deploy.server.control import new_secret, new_token, open_control
from deploy.server.data import DataDirectory
from deploy.settings import Secret, Settings
from meters.catalogue.access import AUDIT
from meters.catalogue.catalogue import TokenCreated
from meters.log import USAGE_CONTROL, USAGE_EVENTS
from meters.meter import Meter
from tests.support.polar.two_servers import TwoSides, call, numbered
from tests.support.records import decisions, entry, line, organization
from tests.support.servers.installation import Installation, meterstream
from tests.support.servers.query_api import Tenant, serving
from tests.support.waiting import PATIENCE_S, eventually

RESETS = 5
Pair = tuple[Decimal | None, Decimal | None]
"""What memory has, and what the raw events make."""


def test_a_running_server_is_compared_with_its_log(servers: tuple[Installation, Installation], sides: TwoSides) -> None:
    """The command finds the socket of whoever serves the directory and compares every line, total and hour."""
    sides.here.send(*numbered(40))
    here = Session(Settings(data=servers[0].data), Output.json)

    report = reconcile(here, Task(checks=("log", "store")))

    assert report.differences == []
    counted = {one.what: one.compared for check in report.checks for one in check.counted}
    assert counted["lines of the log"] >= 40
    assert counted["customers, tokens"] >= 2
    assert counted["hours, tokens"] >= 3
    tokens = list((servers[0].data / "reconcile").glob("token-*"))
    assert tokens
    assert all(token.stat().st_mode & 0o077 == 0 for token in tokens)


@pytest.mark.parametrize("kept", ["", "\0\0\0", "meterstream_unknown"])
def test_a_token_that_is_no_good_any_more_is_made_again(
    servers: tuple[Installation, Installation], sides: TwoSides, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a loss of power left of it, one that was revoked, or one that the restored log does not know: once."""
    monkeypatch.setattr(its_module, "SERVER_PATIENCE_S", 2.0)
    here = Session(Settings(data=servers[0].data, polar_organization=sides.here.id), Output.json)
    path = servers[0].data / "reconcile" / f"token-{sides.here.id}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(kept)

    with own_server(here) as api:
        assert api.get("/v1/meters/")["items"]
    made = path.read_text()
    with own_server(here) as api:
        assert api.get("/v1/meters/")["items"]

    assert path.read_text() == made != kept
    assert path.stat().st_mode & 0o077 == 0
    assert [file.name for file in path.parent.glob(f"{path.name}*")] == [path.name]


def test_elsewhere_an_address_and_a_token_do(
    servers: tuple[Installation, Installation], sides: TwoSides, tmp_path: Path
) -> None:
    """Whoever reads the log but has no socket asks through the gateway, with a token that has the scope."""
    sides.here.send(*numbered(20))
    (tmp_path / "log.sqlite").symlink_to(servers[0].data / "log.sqlite")
    secret = new_secret()
    with open_control(sides.here.data) as control:
        owner = control.organization(sides.here.id)
        control.decide([TokenCreated(new_token(owner, "audit", secret, [AUDIT]))])
    with Api(servers[0].url, secret) as api:
        eventually(lambda: api.send("POST", "/v1/audit/ask/tallies").status_code == 200)

    settings = Settings(data=tmp_path, url=servers[0].url, token=Secret(secret))
    report = reconcile(Session(settings, Output.json), Task())

    assert report.differences == []
    assert report.checks[0].counted[0].compared >= 20


def test_a_token_needs_the_scope_to_see_the_rows(servers: tuple[Installation, Installation], sides: TwoSides) -> None:
    """A tenant's token, with every scope that tokens have by default, is not let in; a made-up question is unknown."""
    refused = sides.here.api.send("POST", "/v1/audit/ask/rows")
    with own_server(Session(Settings(data=servers[0].data), Output.json)) as api:
        unknown = api.send("POST", "/v1/audit/ask/everything")

    assert refused.status_code == 403
    assert unknown.status_code == 404


def test_nothing_differs_while_events_come_in(servers: tuple[Installation, Installation], sides: TwoSides) -> None:
    """Memory and rows are compared at one position, so a busy server agrees, too, and all that it has is compared."""
    for number in range(RESETS):
        names = {"external_id": f"c{number}", "email": f"c{number}@example.com"}
        customer = sides.here.post("/v1/customers/", names)["id"]
        sides.here.post(f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
    stop = threading.Event()

    def send() -> None:
        for batch in itertools.count():
            if stop.is_set():
                return
            sides.here.api.send("POST", "/v1/events/ingest", content=json.dumps({"events": [
                call(f"{batch}-{number}", number, customer=f"c{number}") for number in range(50)
            ]}).encode())  # fmt: skip

    sender = threading.Thread(target=send)
    sender.start()
    try:
        eventually(lambda: sides.here.api.get("/v1/events/")["pagination"]["total_count"] > 500)
        report = reconcile(Session(Settings(data=servers[0].data), Output.json), Task())
    finally:
        stop.set()
        sender.join()

    assert report.differences == []
    counted = [one for check in report.checks for one in check.counted if one.what == "usage of tokens since resets"]
    assert sum(one.compared for one in counted) >= RESETS


class Odd(BaseHTTPRequestHandler):
    """Answers every question to Polar with 200 and the same content."""

    content = b""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Whatever is asked."""
        self.send_response(200)
        self.send_header("content-length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)


@pytest.fixture
def odd() -> Iterator[str]:
    """Where Odd is asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>Back soon.</html>", "something else than a JSON object"),
        (b"[]", "something else than a JSON object"),
        (b'{"items":[]}', "something else than was asked for"),
        (b'{"items":[{"name":"calls"}],"pagination":{"max_page":1}}', "cannot be compared"),
    ],
)
def test_an_odd_answer_of_polars_costs_its_own_check_alone(
    sides: TwoSides, odd: str, content: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has what was compared besides, and says what came; once Polar is well the same run goes through."""
    sides.here.send(*numbered(3))
    sides.there.url = odd
    task = msgspec.structs.replace(sides.task, checks=("log", "upstream"))

    monkeypatch.setattr(Odd, "content", content)
    report = prove(sides.session, task)
    monkeypatch.setattr(Odd, "content", b'{"items":[],"pagination":{"max_page":1,"total_count":0}}')
    again = prove(sides.session, task)

    log, upstream = report.checks
    assert (log.has_failed, upstream.has_failed, report.has_failed) == (False, True, True)
    assert words in upstream.skipped
    assert not again.has_failed


class _Asking:
    """An API in this process, asked as the command asks one over a socket."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant, self._secret = tenant, tenant.token(AUDIT)

    def answer(self, method: str, path: str, *, params: Any = None, content: bytes = b"") -> httpx.Response:
        """One request."""
        return self._tenant.ask(method, path, secret=self._secret, params=params, content=content)


def _of_balance(store: RunningStore, meter: Meter) -> Pair:
    [balance] = store.balances(meter)
    return balance.consumed, balance.recounted


def _of_customer(store: RunningStore, meter: Meter) -> Pair:
    total, raw = store.same_moment(meter, Which(subject=0)) or (None, None)
    return total and total.sum, raw and raw.total


def _of_blocks(store: RunningStore, meter: Meter) -> Pair:
    [both] = store.both([meter])
    [(total, raw)] = both.blocks
    return total.sum, raw.total


@pytest.mark.parametrize(("ask", "tokens"), [(_of_balance, 4), (_of_customer, 5), (_of_blocks, 5)])
def test_a_round_that_has_moved_memory_is_compared_once_it_is_published(
    tmp_path: Path, ask: Callable[[RunningStore, Meter], Pair], tokens: int
) -> None:
    """In between memory is newer than the position that it is published for."""
    with serving(tmp_path) as server:
        tenant = server.tenant()
        meter_id, customer = tenant.meter(func="sum", property="tokens"), tenant.customer(external_id="ann")
        tenant.send(line("before", metadata={"tokens": 1}))
        server.now += timedelta(seconds=1)
        tenant.post(f"/v1/customers/{customer}/resets", {"meter_ids": "all"})
        server.now += timedelta(seconds=1)
        engine, store = server.aggregator._now, RunningStore(_Asking(tenant))
        begin_windows, wait_for = engine._boundaries.begin_windows, server.aggregator.wait_for
        has_moved, is_awaited = threading.Event(), threading.Event()

        def hold(totals: RunningTotals) -> None:
            has_moved.set()
            assert is_awaited.wait(PATIENCE_S)
            begin_windows(totals)

        async def wait(position: Mapping[int, int], timeout_s: float) -> bool:
            is_awaited.set()
            return await wait_for(position, timeout_s)

        with patch.object(engine._boundaries, "begin_windows", hold), patch.object(server.aggregator, "wait_for", wait):
            said = entry(line("after", metadata={"tokens": 4}), organization_id=tenant.id)
            server.run(server.log.append(USAGE_EVENTS, [said]))
            assert has_moved.wait(PATIENCE_S)
            try:
                found = ask(store, engine.catalogue.meters[meter_id])
            finally:
                is_awaited.set()

    assert found == (tokens, tokens)


@pytest.mark.parametrize("amount", ["4", "12345678901234567890123456.123456789012"])
def test_what_is_kept_in_memory_is_compared(tmp_path: Path, amount: str) -> None:
    """A running total that has an event twice is named with customer, hour and amount; so is the hour of everybody."""
    with serving(tmp_path) as server:
        tenant = server.tenant()
        tenant.meter(func="sum", property="tokens")
        for number in range(6):
            metadata = f'{{"tokens":{amount if number == 4 else number}}}'
            tenant.send(line(f"e{number}", metadata=metadata, timestamp=f"2026-03-01T0{number}:30:00Z"))
        engine = server.aggregator._now
        with engine.store.read() as snapshot:
            event = snapshot.connection.sql("SELECT * EXCLUDE source FROM events WHERE external_id = 'e4'")
            again = event.to_arrow_table()
        engine.totals.add(engine.totals.evaluate(again))  # as if a round had been counted twice
        store = RunningStore(_Asking(tenant))
        check = check_store(store, store, engine.catalogue, Worth(engine.catalogue))

    of_customer, of_hour = check.differences
    assert of_customer.cause is of_hour.cause is Cause.DOUBLED
    assert of_customer.where == "Tokens, customer ann"
    assert of_customer.window == of_hour.window
    assert of_hour.where == "Tokens, 2026-03-01 04:00 UTC, everybody"
    assert of_customer.quantities == of_hour.quantities == {"Tokens": Decimal(amount)}


def test_hours_so_old_that_no_chart_shows_them_are_no_difference(tmp_path: Path) -> None:
    """Their quarter hours are not kept apart; the customer's total has the event, and newer hours are compared."""
    with serving(tmp_path) as server:
        tenant = server.tenant()
        tenant.meter(func="sum", property="tokens")
        for number, year in enumerate((1999, 2021, 2022, 2026)):
            tenant.send(line(f"e{number}", metadata={"tokens": number}, timestamp=f"{year}-03-01T00:30:00Z"))
        store = RunningStore(_Asking(tenant))
        check = check_store(store, store, server.aggregator._now.catalogue, Worth(server.aggregator._now.catalogue))

    assert check.differences == []
    compared = {one.what: one.compared for one in check.counted}
    assert (compared["customers, Tokens"], compared["hours, Tokens"]) == (1, 2)


# httpcore does not close a Unix socket whose connection was refused.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_socket_that_nobody_listens_on_is_named(tmp_path: Path) -> None:
    """A killed server leaves it behind: the line names the directory's socket, and no address that nobody gave."""
    data = DataDirectory(tmp_path)
    with contextlib.closing(data.open_log()) as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization()])))
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as left_over:
        left_over.bind(str(data.socket))

    with (
        pytest.raises(GiveUp, match=f"no server answers at {data.socket}; start one with `meterstream serve --data "),
        own_server(Session(Settings(data=tmp_path), Output.json)),
    ):
        pytest.fail("nobody answers")


@pytest.mark.parametrize("killed", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_differs_after_an_end_in_the_middle(installation: Installation, killed: signal.Signals) -> None:
    """However the server ended while events came in, what it left agrees: every line it read is counted, once."""
    installation.start()
    sender = threading.Thread(target=_send_until_refused, args=(installation.url, installation.token))
    sender.start()
    eventually(lambda: int(installation.get("/v1/meters/").headers["As-Of"].removeprefix("0:")) >= 3)
    installation.stop(killed)
    sender.join()

    found = meterstream("reconcile", "--data", str(installation.data), "--check", "log", "--check", "store")

    assert found.returncode == 0, found.stdout + found.stderr
    assert "Everything agrees" in found.stdout


def _send_until_refused(url: str, token: str) -> None:
    """Batches, each of which repeats some of the last one, for as long as they are taken."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
        for batch in range(10_000):
            events = [
                {"name": "call", "external_customer_id": "ann", "external_id": f"{batch + number // 50}-{number % 50}"}
                for number in range(60)
            ]
            try:
                client.post("/v1/events/ingest", json={"events": events}).raise_for_status()
            except httpx.HTTPError:
                return
