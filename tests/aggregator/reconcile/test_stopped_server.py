"""``meterstream reconcile`` on the files of a stopped server."""

import asyncio
import json
from pathlib import Path

import msgspec
import pytest

from aggregator.forward.polar_client import ATTEMPTS_MAX, Clock, NoAnswer, RequestWindow, Upstream
from aggregator.reconcile.html import page
from aggregator.reconcile.report import Cause, Repair
from meters.log import USAGE_CONTROL, USAGE_EVENTS
from tests.support.faults.store_checks import usage
from tests.support.records import created, decisions, entry, meter, organization
from tests.support.servers.installation import meterstream
from tests.support.servers.stopped_installation import Left

ROOT = "(SELECT seq FROM events WHERE external_id = 'root' LIMIT 1)"


def test_different_is_3_until_it_is_repaired(left: Left, tmp_path: Path) -> None:
    """A difference is told with its cause; a repair makes the store again, says so, and a second one finds nothing."""
    left.spoil(f"DELETE FROM events WHERE seq = {ROOT}")
    where, shown = ("--data", str(left.data.path), "--check", "log", "--check", "store"), tmp_path / "report.html"

    different = meterstream("reconcile", *where, "--report", str(shown))
    planned, repaired, again = (left.prove(repair) for repair in ("plan", "apply", "apply"))

    assert different.returncode == 3, different.stderr
    assert "lost: event root" in different.stdout
    assert "lost" in shown.read_text()
    assert shown.stat().st_mode & 0o077 == 0, "it names customers and money"
    assert not planned.is_equal
    assert "made again from the log" in planned.plan[0].what
    assert repaired.is_equal
    assert [done.repair for done in repaired.done] == [Repair.REBUILD]
    assert Cause.LOST in {difference.cause for difference in repaired.mended}
    assert (again.is_equal, again.done) == (True, [])
    assert len((left.data.path / "reconcile" / "repairs.jsonl").read_text().splitlines()) == 1


def test_a_meter_s_name_does_not_steer_a_terminal(tmp_path: Path) -> None:
    """What a tenant wrote is shown harmless wherever a difference shows it."""
    left = Left(tmp_path)
    with left.log() as log:
        named = msgspec.structs.replace(meter("m", func="count"), name="\x1b[31mred")
        asyncio.run(log.append(USAGE_CONTROL, decisions([organization(), *created(named)])))
        asyncio.run(log.append(USAGE_EVENTS, [entry(usage("a"), usage("b"))]))
    left.count()
    left.spoil("DELETE FROM events WHERE external_id = 'a'")

    done = meterstream("reconcile", "--data", str(left.data.path), "--check", "log")

    assert done.returncode == 3, done.stderr
    assert "\N{REPLACEMENT CHARACTER}[31mred -1" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_page_goes_to_stdout_and_only_here(left: Left) -> None:
    """``--output html`` prints the page; other commands have none and say so."""
    shown = meterstream("reconcile", "--data", str(left.data.path), "--check", "log", "--output", "html")
    assert shown.returncode == 0, shown.stderr
    refused = meterstream("doctor", "--data", str(left.data.path), "--output", "html")

    assert shown.stdout.startswith("<!doctype html>")
    assert refused.returncode == 2


def test_what_could_not_be_compared_is_said_and_is_1(left: Left) -> None:
    """With a Polar organization set up and no server running the rest is compared, and the exit code is 1."""
    done = meterstream(
        "reconcile", "--data", str(left.data.path), "--output", "json", METERSTREAM_POLAR_TOKEN="polar_oat_x",
    )

    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert (found["equal"], found["failed"]) == (True, True)
    assert "no server runs" in found["checks"][-1]["skipped"]


def test_with_csv_the_verdict_is_on_stderr(left: Left) -> None:
    """The answer is rows alone; what was left out and why, and the verdict, are told beside it."""
    done = meterstream(
        "reconcile", "--data", str(left.data.path), "--output", "csv", METERSTREAM_POLAR_TOKEN="polar_oat_x",
    )

    assert done.returncode == 1
    assert done.stdout == "check,cause,where,what,events,quantities,cents,repair\n"
    assert "upstream was not compared: no server runs" in done.stderr
    assert "Everything that was compared agrees; Polar was not compared, as of log position" in done.stderr


@pytest.mark.parametrize("until", ["2026-01-01", "2027-01-01"])
def test_a_range_that_holds_nothing_is_wrong_usage(left: Left, until: str) -> None:
    """Comparing nothing would say that everything agrees."""
    done = meterstream("reconcile", "--data", str(left.data.path), "--since", "2027-01-01", "--until", until)

    assert (done.returncode, done.stdout) == (2, "")
    assert "--until must be later than --since" in done.stderr


def test_a_range_of_another_zone_is_compared_and_told_in_utc(left: Left, tmp_path: Path) -> None:
    """Midnight in Berlin is no midnight in UTC, which is what days, hours and the report go by."""
    shown = tmp_path / "report.html"
    given = "--since", "2026-03-01T00:00:00+01:00", "--until", "2026-03-02T00:00:00-05:00"

    done = meterstream(
        "reconcile", "--data", str(left.data.path), "--check", "log", *given, "--report", str(shown),
        "--output", "json",
    )  # fmt: skip

    found = json.loads(done.stdout)
    assert (found["since"], found["until"]) == ("2026-02-28T23:00:00Z", "2026-03-02T05:00:00Z")
    assert "from 2026-02-28 23:00 UTC to 2026-03-02 05:00 UTC" in shown.read_text()


def test_an_upstream_that_does_not_answer_is_told_once(tmp_path: Path) -> None:
    """A read is tried for minutes, and whoever waits hears why, at the first of them."""
    told, pauses = [], []
    window = RequestWindow(tmp_path / "requests", clock=Clock(lambda: 0, pauses.append, lambda: 0))

    with (
        Upstream("http://127.0.0.1:9", "token", window, on_trouble=told.append) as upstream,
        pytest.raises(NoAnswer),
    ):
        upstream.get("/v1/meters/")
    window.close()

    assert len(pauses) == ATTEMPTS_MAX - 1
    assert len(told) == 1
    assert told[0].startswith("http://127.0.0.1:9 does not answer: ConnectError")


def test_without_a_polar_organization_nothing_is_missed(left: Left) -> None:
    """Who forwards nothing has nothing to compare there."""
    report = left.prove()

    assert report.is_equal
    assert [check.skipped for check in report.checks] == ["", "", "", "METERSTREAM_POLAR_TOKEN is not set"]
    assert report.verdict == "Everything that was compared agrees; Polar was not compared"
    assert f"{report.verdict}." in page(report)
    assert "Polar&#x27;s (METERSTREAM_POLAR_TOKEN is not set)" in page(report)


def test_a_comparison_that_was_asked_for_by_name_is_not_left_out(left: Left) -> None:
    """Without a Polar organization `--check upstream` is wrong usage, and nothing is said to agree."""
    done = meterstream("reconcile", "--data", str(left.data.path), "--check", "upstream")

    assert (done.returncode, done.stdout) == (2, "")
    assert "set METERSTREAM_POLAR_TOKEN; nothing was compared" in done.stderr
