"""Over a Kafka that is away or was tampered with, or a command that was mistyped: what is said, and how it ends."""

import contextlib
import re
import socket
from pathlib import Path

import httpx

from deploy.commands.kafka import measured
from tests.support.kafka.cluster import Cluster
from tests.support.kafka.installation import Process, own_brokers
from tests.support.kafka.separate_processes import Apart, answer, usage
from tests.support.ports import take_port
from tests.support.servers.installation import Installation, meterstream
from tests.support.waiting import eventually


def is_ready(port: int) -> bool:
    """Whether the gateway there says so."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    return False


def test_a_gateway_ends_where_decisions_were_deleted_and_made_again(
    kafka: Cluster, log_url: str, tmp_path: Path
) -> None:
    """One line and exit code 1, for whoever starts it again: it would be alive, and refuse everything, for ever."""
    made = answer("kafka", "init", "--log", log_url)
    port = take_port()
    gateway = Process("bereft", ["gateway", "--log", log_url, "--port", str(port)], tmp_path)
    gateway.start()
    try:
        eventually(lambda: is_ready(port))
        topic = made[1]["topic"]
        admin = kafka.admin()
        admin.delete_topics([topic])[topic].result(30)
        eventually(lambda: topic not in admin.list_topics(timeout=30).topics)
        answer("kafka", "init", "--log", log_url)
        eventually(lambda: not gateway.running)
        assert gateway.wait() == 1
    finally:
        gateway.stop()
    last = gateway.output.splitlines()[-1]
    assert last.startswith("meterstream: the decisions cannot be followed from 0:0: ")
    assert "was deleted and made again; bring that stream back" in last
    assert "Traceback" not in gateway.output
    assert "reads_are_answered_503" in gateway.output  # there is no --upstream


def test_an_aggregator_says_that_its_address_is_taken(tmp_path: Path) -> None:
    """Before it makes anything, and with one line, as a gateway does; so is an address that there is not."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = ("aggregate", "--log", "kafka://127.0.0.1:1", "--data", str(tmp_path))
        port = str(taken.getsockname()[1])
        done = [meterstream(*where, "--port", port), meterstream(*where, "--host", "no.such.invalid", "--port", port)]

    assert [each.returncode for each in done] == [1, 2]
    assert f"cannot listen on 127.0.0.1 port {port}" in done[0].stderr
    assert "--host no.such.invalid: " in done[1].stderr
    assert [len(each.stderr.splitlines()) for each in done] == [1, 1]
    assert not (tmp_path / "store.duckdb").exists()


def test_a_lag_that_nobody_knows_is_not_none(tmp_path: Path) -> None:
    """While the brokers do not answer, the last look is shown with its age, and exit code 1."""
    with own_brokers(tmp_path) as cluster:
        place = Apart(f"kafka://{cluster.bootstrap}", tmp_path)
        with contextlib.closing(place):
            place.prepare()
            place.start()
            lag = ("lag", "--url", place.api_url)
            eventually(lambda: meterstream(*lag).returncode == 0)
            [node] = cluster.nodes
            node.pause()
            stale = eventually(lambda: (done := meterstream(*lag)).returncode == 1 and done)
            node.resume()
            assert re.search(r"this is as of \d+ s ago; the brokers do not answer", stale.stderr)
            assert "records behind" not in stale.stdout + stale.stderr
            eventually(lambda: meterstream(*lag).returncode == 0)


def test_what_is_counted_is_no_further_than_the_end() -> None:
    """The end is looked at now and then, and the position moves meanwhile."""
    metrics = (
        "# TYPE meterstream_position gauge\n"
        'meterstream_position{partition="0"} 12.0\nmeterstream_position{partition="1"} 4.0\n'
        "# TYPE meterstream_log_end gauge\n"
        'meterstream_log_end{partition="0"} 10.0\nmeterstream_log_end{partition="1"} 7.0\n'
        "meterstream_lag_looked_seconds 1790000000.5\n"
    )
    assert measured(metrics, "http://127.0.0.1") == (
        [{"partition": 0, "position": 12, "end": 12, "lag": 0}, {"partition": 1, "position": 4, "end": 7, "lag": 3}],
        1790000000.5,
    )  # fmt: skip


def test_serve_begins_without_its_brokers(tmp_path: Path, installation: Installation) -> None:
    """It answers at once that it waits, makes the first token when they are there, and waits in the same way again."""
    with own_brokers(tmp_path, start=False) as cluster:
        log = ("--log", f"kafka://{cluster.bootstrap}")
        installation.launch(*log)
        waiting = eventually(lambda: "waiting_for" in (found := installation.get("/readyz")).json() and found)
        assert waiting.status_code == 503
        assert "do not answer" in waiting.json()["waiting_for"]
        assert installation.get("/livez").status_code == 200
        refused = installation.ingest(usage("too early"))
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)

        cluster.start()
        answer("kafka", "init", *log)
        installation.await_first_token()
        assert eventually(lambda: (taken := installation.ingest(usage("in time"))).status_code == 200 and taken)
        assert installation.stop() == 0
        cluster.stop()
        installation.launch(*log)
        again = eventually(lambda: "waiting_for" in (found := installation.get("/readyz")).json() and found)
        assert again.status_code == 503
        assert installation.stop() == 0


def test_the_doctor_tells_a_directory_that_was_mistyped(log_url: str, tmp_path: Path) -> None:
    """Brokers answer whatever --data says; that there is no store is a finding, and none is made by looking."""
    answer("kafka", "init", "--log", log_url)
    answer("orgs", "create", "acme", "--log", log_url)
    for place in (tmp_path / "mistyped", tmp_path):
        found = answer("doctor", "--log", log_url, "--data", str(place), code=1)
        [ill] = [row for row in found if row["heal"]]
        assert (ill["part"], ill["found"]) == ("store", f"there is none in {place}")
        assert "give the right --data" in ill["heal"]
    assert list(tmp_path.iterdir()) == []


def test_an_aggregator_says_once_what_it_waits_for(log_url: str, tmp_path: Path) -> None:
    """It tries again and again until its topics are there, and then counts."""
    port = take_port()
    where = ["--log", log_url, "--port", str(port), "--data", str(tmp_path / "data")]
    aggregator = Process("first", ["aggregate", *where], tmp_path)
    aggregator.start()

    def failures() -> int:
        with contextlib.suppress(httpx.TransportError):
            metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
            return int(float(metrics.partition("\nmeterstream_engine_failures_total ")[2].partition("\n")[0]))
        return 0

    try:
        eventually(lambda: failures() >= 3)
        assert aggregator.output.count('"event": "engine_ended"') == 1
        assert "`meterstream kafka init` makes it" in aggregator.output
        answer("kafka", "init", "--log", log_url)
        eventually(lambda: meterstream("lag", "--url", f"http://127.0.0.1:{port}").returncode == 0)
    finally:
        aggregator.stop()
