"""What the forwarder's process knows of where it sends to."""

import contextlib
from pathlib import Path

from aggregator.forward.state import State
from deploy.forwarding import know_destination
from deploy.settings import Settings, Token
from tests.support.servers.installation import meterstream


def test_what_one_organization_took_is_never_sent_to_another(tmp_path: Path) -> None:
    """A token or a server that changed makes what was taken last mean nothing; a new start does not."""
    first = Settings(polar_token=Token("one"))
    others = [Settings(polar_token=Token("two")), Settings(polar_token=Token("one"), polar_server="sandbox")]
    with contextlib.closing(State(tmp_path / "forward.sqlite")) as state:
        for other in others:
            know_destination(state, first)
            state.set(taken_last={"external_id": "a", "body": "{}"})
            know_destination(state, first)
            assert "taken_last" in state.flags()
            know_destination(state, other)
            assert "taken_last" not in state.flags()


def test_a_directory_that_was_mistyped_is_named(tmp_path: Path) -> None:
    """With the log on Kafka nothing else is in the way, and none is made."""
    place = tmp_path / "mistyped"
    where = ("--log", "kafka://127.0.0.1:1", "--data", str(place))

    for more in ((), ("plan",)):
        done = meterstream("forward", *more, *where, METERSTREAM_POLAR_TOKEN="t")
        assert (done.returncode, f"there is no directory {place}" in done.stderr) == (1, True)
    assert not place.exists()
