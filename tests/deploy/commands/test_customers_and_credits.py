"""Customers and credits from the command line, against a real server."""

import json
import threading
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.support.servers.installation import Installation, meterstream
from tests.support.waiting import eventually

EVENTS = """{"name":"render","external_customer_id":"eve","external_id":"b1","metadata":{"pages":30}}
{"name":"render","external_customer_id":"eve","external_id":"b2","metadata":{"pages":12.5}}
"""


@pytest.fixture(scope="module")
def account(running: Installation) -> Installation:
    """A customer that used 42.5 of the 100 units that were given, and is asked for by an external id."""
    running.answer("meters", "create", "--name", "pages", "--sum", "pages", "--where", "name=render")
    running.answer("events", "send", "-", text=EVENTS)
    running.answer("customers", "create", "--email", "eve@example.com", "--external-id", "eve", "--name", "Eve")
    for _ in range(2):
        running.answer("credits", "grant", "eve", "pages", "100", "--key", "first")
    eventually(lambda: running.answer("customers", "balance", "eve")[0]["balance"] == 57.5)
    return running


def test_customers_are_found_by_either_name(account: Installation) -> None:
    """The list, the external id and the id show the same customer."""
    (listed,) = account.answer("customers", "list", "--query", "eve@")
    by_name = account.answer("customers", "state", "eve")
    by_id = account.answer("customers", "state", listed["id"])
    assert by_name == by_id
    assert by_name["active_meters"][0]["balance"] == 57.5
    done = account.run("customers", "balance", "nobody")
    assert (done.returncode, done.stdout) == (2, "")
    assert "meterstream customers list" in done.stderr


def test_a_name_with_a_slash_is_nobody_elses(account: Installation) -> None:
    """Through gateway and query API: credits for ``acme/`` are not for ``acme``, whose state is not that of another."""
    for name in ("acme", "acme/", "acme/state", "acme%2Fstate"):
        account.answer("customers", "create", "--email", f"{name.encode().hex()}@example.com", "--external-id", name)
    account.answer("credits", "grant", "acme/", "pages", "100")
    assert account.answer("credits", "list", "acme") == []
    for name in ("acme", "acme/", "acme/state", "acme%2Fstate"):
        assert account.answer("customers", "state", name)["external_id"] == name


class Decoding(BaseHTTPRequestHandler):
    """What a query API hears through a proxy that decodes paths: whoever is asked for, acme is told of."""

    def do_GET(self) -> None:
        """Any request."""
        body = json.dumps({"id": "00000000-0000-4000-8000-000000000001", "external_id": "acme"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize("name", ["acme/", "00000000-0000-4000-8000-000000000001/"])
def test_whoever_else_is_answered_with_is_not_the_customer(name: str) -> None:
    """Nothing is asked about, or given to, somebody whose names are others."""
    with HTTPServer(("127.0.0.1", 0), Decoding) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            done = meterstream("customers", "state", name, "--url", url, "--token", "t")
        finally:
            server.shutdown()
            thread.join()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"there is no customer {name!r}" in done.stderr


def test_a_ledger_is_printed_as_a_statement(account: Installation) -> None:
    """Movements with signs, what was left after each, and the balance below; and the events behind a movement."""
    shown = account.run("customers", "ledger", "eve", "pages", "--output", "table").stdout
    assert "pages of eve" in shown
    assert "+100" in shown
    assert "-42.5" in shown
    assert shown.rstrip().endswith("Balance 57.5: credited 100, consumed 42.5 since the last reset.")
    entries = account.answer("customers", "ledger", "eve", "pages")
    assert sum(Decimal(str(entry["units"])) for entry in entries) == Decimal("57.5")
    used = next(entry["id"] for entry in entries if entry["cause"] == "usage")
    behind = account.answer("customers", "ledger", "eve", "pages", "--entry", used)
    assert sorted(event["metadata"]["pages"] for event in behind) == [12.5, 30]
    given = next(entry["id"] for entry in entries if entry["cause"] != "usage")
    refused = account.run("customers", "ledger", "eve", "pages", "--entry", given)
    assert refused.returncode == 2
    assert "only usage has events" in refused.stderr


def test_credits_are_given_listed_and_taken_back(account: Installation) -> None:
    """Twice with one key is once; taking back twice is once; both stand in the list."""
    made = account.answer("credits", "grant", "eve", "pages", "7", "--rollover")
    for _ in range(2):
        assert account.answer("credits", "revoke", "eve", made["id"])["units"] == -7
    listed = account.answer("credits", "list", "eve")
    assert [(credit["units"], credit["cause"]) for credit in listed] == [(-7, "revoke"), (7, "credit"), (100, "credit")]
    other = account.run("credits", "grant", "eve", "pages", "8", "--key", "first")
    assert (other.returncode, "used for another request" in other.stderr) == (2, True)
    assert account.run("credits", "revoke", "eve", "nothing").returncode == 2


@pytest.mark.parametrize(
    "line",
    [
        ("credits", "revoke", "eve", ".."),
        ("credits", "revoke", "eve", "../."),
        ("credits", "revoke", "eve", ""),
        ("customers", "state", "."),
        ("events", "replay", ".."),
    ],
)
def test_what_would_lead_to_another_path_is_no_id(account: Installation, line: tuple[str, ...]) -> None:
    """Nothing is asked for: two dots for a credit would have been the customer itself, and deleted it."""
    done = account.run(*line)

    assert (done.returncode, done.stdout) == (2, "")
    assert f"is an id, and not {line[-1]!r}" in done.stderr
    assert account.answer("customers", "state", "eve")["deleted_at"] is None


def test_more_units_than_there_can_be_are_wrong_usage(account: Installation) -> None:
    """The argument is named, as the command line knows it."""
    done = account.run("credits", "grant", "eve", "pages", "2147483648")

    assert (done.returncode, done.stdout) == (2, "")
    assert "UNITS: Input should be a whole number from 1 to 2147483647" in done.stderr
