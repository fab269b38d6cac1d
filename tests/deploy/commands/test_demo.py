"""The demonstration, in short."""

from tests.support.servers.installation import meterstream


def test_a_short_demonstration_finds_no_difference() -> None:
    """A few hundred requests go through the whole pipeline, and every figure equals the recount."""
    done = meterstream("demo", "--rows", "300")

    assert done.returncode == 0, done.stderr
    assert "figures equal a plain recount of the trace." in done.stdout
    assert "events/s over HTTP" in done.stdout
    assert "Queryable" in done.stdout
