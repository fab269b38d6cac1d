"""What sending says of what does not count: an external id that was taken with other content, or nothing at all."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from tests.support.kafka.installation import Process
from tests.support.ports import take_port
from tests.support.servers.installation import Installation, meterstream
from tests.support.waiting import eventually

DO_NOT_COUNT = "events have an external id that was taken with other content, and do not count"


def events(count: int, tokens: int) -> str:
    """Events of the same ids, whatever they say."""
    line = '{"name":"call","external_customer_id":"ada","external_id":"c%d","metadata":{"tokens":%d}}\n'
    return "".join(line % (number, tokens) for number in range(count))


def test_an_import_that_reads_the_rows_otherwise_does_not_count(running: Installation, tmp_path: Path) -> None:
    """It ends with exit code 1 and says how many; the first reading, sent again, has no conflicts of its own."""
    (path := tmp_path / "map.csv").write_text("user,in,out\nada,1,10\nbob,2,20\n")
    command = ("events", "import", str(path), "--set", "name=remap", "--map")
    columns = "external_customer_id=user,metadata.tokens="

    first = running.answer(*command, f"{columns}in")
    other = running.run(*command, f"{columns}out", "--output", "json")
    again = running.answer(*command, f"{columns}in")

    assert (first["conflicts"], again["conflicts"], json.loads(other.stdout)["conflicts"]) == (0, 0, 2)
    assert other.returncode == 1
    assert f"2 {DO_NOT_COUNT}; `meterstream events dead` shows them" in other.stderr


def test_a_conflict_is_replayed_under_another_id_alone(running: Installation, tmp_path: Path) -> None:
    """As it is it would be one again; mended it counts, and its letter is done with and goes in no second time."""
    event = '{"name":"twice","external_customer_id":"ada","external_id":"%s","metadata":{"tokens":%d}}\n'
    running.answer("events", "send", "-", text=event % ("taken", 1))
    assert running.run("events", "send", "-", text=event % ("taken", 2)).returncode == 1
    letter = next(one for one in running.answer("events", "dead") if '"taken"' in one["raw"])
    (mended := tmp_path / "mended.json").write_text(event % ("another", 2))
    (same := tmp_path / "same.json").write_text(event % ("taken", 3))
    replay = ("events", "replay", letter["id"])

    refused = [running.run(*replay), running.run(*replay, "--file", str(same))]
    taken = running.answer(*replay, "--file", str(mended))
    again = running.run(*replay, "--file", str(mended))

    assert [done.returncode for done in (*refused, again)] == [1, 1, 1]
    assert all("stays on the list: its external_id was taken" in done.stderr for done in refused)
    assert taken["replayed_at"]
    assert "is not sent again" in again.stderr


def test_conflicts_are_known_after_a_restart_and_on_every_page(installation: Installation) -> None:
    """A gateway that has just started takes them all for new; there are more of them than a page of letters has."""
    installation.start()
    assert installation.answer("events", "send", "-", text=events(230, tokens=1))["conflicts"] == 0
    installation.stop()
    installation.start()

    done = installation.run("events", "send", "-", "--batch", "100", "--output", "json", text=events(230, tokens=2))
    answer = json.loads(done.stdout)
    more = installation.run("events", "send", "-", text="{\n" + events(1, tokens=3))

    assert (done.returncode, answer["inserted"], answer["conflicts"]) == (1, 230, 230)
    assert more.returncode == 1
    assert f"1 {DO_NOT_COUNT}" in more.stderr
    assert "1 line was rejected" in more.stderr


def test_sending_needs_nobody_who_counts(installation: Installation, tmp_path: Path) -> None:
    """A gateway alone takes events; that nobody can look for conflicts is said, and is no failure."""
    installation.start()
    installation.stop()
    port = take_port()
    gateway = Process("gateway", ["gateway", "--port", str(port), "--data", str(installation.data)], tmp_path)
    gateway.start()
    try:
        url = f"http://127.0.0.1:{port}"
        command = ("events", "send", "-", "--url", url, "--token", installation.token, "--output", "json")
        eventually(lambda: "listening" in gateway.output)
        done = meterstream(*command, text=events(1, tokens=1))
    finally:
        gateway.stop()

    assert (done.returncode, json.loads(done.stdout)["conflicts"]) == (0, None)
    assert "whether an external id was taken with other content could not be looked up: " in done.stderr


class Polar(BaseHTTPRequestHandler):
    """A server that takes every event, and has neither a log nor letters."""

    def do_POST(self) -> None:
        """Any request."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"inserted":1,"duplicates":0}')


def test_a_server_without_a_log_is_not_asked() -> None:
    """Sending to one that only speaks Polar's API ends as it always did."""
    with HTTPServer(("127.0.0.1", 0), Polar) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        done = meterstream("events", "send", "-", "--url", url, "--token", "t", text=events(1, tokens=1))
        server.shutdown()
        thread.join()

    assert (done.returncode, done.stderr) == (0, "")


def test_where_nothing_is_sent_that_is_said(running: Installation, tmp_path: Path) -> None:
    """An empty pipe, or a CSV file of a header alone, is no failure, and not silent either."""
    path = tmp_path / "header.csv"
    path.write_text("user\n")
    columns = ("--map", "external_customer_id=user", "--set", "name=csv")

    for command in (("send", "-"), ("import", str(path), *columns)):
        done = running.run("events", *command, text="")
        assert (done.returncode, "there was no event in it" in done.stderr) == (0, True)
