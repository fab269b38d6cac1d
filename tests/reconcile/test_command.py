"""``meterstream reconcile`` on the files of a stopped server."""

import json
from pathlib import Path

from tests.deploy.installation import meterstream
from tests.reconcile.planting import Left

ROOT = "(SELECT seq FROM events WHERE external_id = 'root' LIMIT 1)"


def test_equal_is_0_and_different_is_3_until_it_is_repaired(left: Left, tmp_path: Path) -> None:
    """The exit code tells the two apart; a repair makes the store again, says so, and a second one finds nothing."""
    where = ("--data", str(left.data.path), "--check", "log", "--check", "store")
    page = tmp_path / "report.html"

    equal = meterstream("reconcile", *where)
    left.spoil(f"DELETE FROM events WHERE seq = {ROOT}")
    different = meterstream("reconcile", *where, "--report", str(page))
    planned = json.loads(meterstream("reconcile", *where, "--repair", "plan", "--output", "json").stdout)
    repaired = meterstream("reconcile", *where, "--repair", "apply", "--output", "json")
    again = json.loads(meterstream("reconcile", *where, "--repair", "apply", "--output", "json").stdout)

    assert (equal.returncode, different.returncode, repaired.returncode) == (0, 3, 0), repaired.stderr
    assert "lost" in different.stdout
    assert "lost" in page.read_text()
    assert planned["equal"] is False
    assert "made again from the log" in planned["plan"][0]["what"]
    answer = json.loads(repaired.stdout)
    assert answer["done"][0]["repair"] == "rebuild the store"
    assert answer["mended"][0]["cause"] == "lost"
    assert (again["equal"], again["done"]) == (True, [])
    written = (left.data.path / "reconcile" / "repairs.jsonl").read_text().splitlines()
    assert len(written) == 1


def test_a_page_goes_to_stdout_and_only_here(left: Left) -> None:
    """``--output html`` prints the page; other commands have none and say so."""
    shown = meterstream("reconcile", "--data", str(left.data.path), "--check", "log", "--output", "html")
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


def test_without_a_polar_organization_nothing_is_missed(left: Left) -> None:
    """Who forwards nothing has nothing to compare there."""
    done = meterstream("reconcile", "--data", str(left.data.path), "--output", "json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checks"][-1]["skipped"] == "METERSTREAM_POLAR_TOKEN is not set"
