"""First the sandbox, then production, on one data directory: each gets everything, and nothing twice."""

from pathlib import Path

from aggregator.forward.feed_client import Selection
from deploy.forwarding import know_destination
from deploy.settings import Secret, Settings
from tests.aggregator.forward.test_forwarder import Room, events, ids, room
from tests.support.polar.forwarder import Clocks, Running
from tests.support.polar.proxy import POISON, Polar, send
from tests.support.servers.installation import Installation

__all__ = ["room"]


def forwarded(room: Room, clocks: Clocks, server: Polar, state: Path, taken: int) -> dict[str, int]:
    """Forward to the server, as a process that is told of it does, until so much was taken; its books."""
    selection = Selection(names=(room.name,))
    with Running(room.feed, server.url, state, clocks=clocks, selection=selection) as running:
        know_destination(running.state, Settings(polar_token=Secret(server.url), polar_server=server.url))
        running.until(lambda: running.done(taken))
        assert len(running.state.dead()) == running.books()["dead"]
        return running.books()


def test_what_the_sandbox_took_goes_to_production_too(
    room: Room, clocks: Clocks, polar: Polar, upstream: Installation, state: Path
) -> None:
    """What it refused, too, and in order; and back at the sandbox only what came since is sent."""
    sent = events(room.name, 18)
    sent[4]["external_id"] = f"{POISON}-{room.name}"
    sandbox, production = polar, Polar(upstream, clocks.now_us)
    production.knows_everybody = True
    try:
        send(room.ours, sent[:10])
        assert forwarded(room, clocks, sandbox, state, 10) == {"taken": 10, "accepted": 9, "dead": 1}
        send(room.ours, sent[10:15])
        assert forwarded(room, clocks, production, state, 15) == {"taken": 15, "accepted": 15, "dead": 0}
        send(room.ours, sent[15:])
        assert forwarded(room, clocks, sandbox, state, 18) == {"taken": 18, "accepted": 17, "dead": 1}
    finally:
        production.close()

    assert sandbox.committed == ids(sent[:4] + sent[5:])
    assert production.committed == ids(sent[:15])
