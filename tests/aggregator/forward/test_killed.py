"""A forwarder that is killed between sending and marking sends again, and nothing counts twice."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

from aggregator.forward.feed_client import Selection
from tests.aggregator.forward.test_forwarder import Room, by_customer, events, ids, room
from tests.support.polar.forwarder import Running, forward_for_ever
from tests.support.polar.proxy import send

__all__ = ["room"]
ROUNDS = 20
EVENTS_A_ROUND = 15


def killed_while_polar_answers(room: Room, state: Path) -> None:
    """Start a process that forwards, and kill it when Polar has committed a batch and not yet said so."""
    room.polar.committing.clear()
    room.polar.answering.clear()
    context = multiprocessing.get_context("forkserver")  # Python is started and its modules are loaded once
    context.set_forkserver_preload(["tests.support.polar.forwarder"])
    where = *room.feed, room.polar.url, str(state), room.name
    process = context.Process(target=forward_for_ever, args=where)
    process.start()
    try:
        assert room.polar.committing.wait(60), process.exitcode
    finally:
        process.kill()
        process.join()
        process.close()
        room.polar.answering.set()


def test_killed_between_send_and_mark(
    room: Room, state: Path, record_property: Callable[[str, object], None]
) -> None:
    """Twenty times: what was sent and not marked is sent again with its ids; Polar says so and counts it once."""
    sent = events(room.name, ROUNDS * EVENTS_A_ROUND)
    for round_ in range(ROUNDS):
        send(room.ours, sent[round_ * EVENTS_A_ROUND : (round_ + 1) * EVENTS_A_ROUND])
        killed_while_polar_answers(room, state)
    selection = Selection(names=(room.name,))
    with Running(room.feed, room.polar.url, state, selection=selection) as running:
        running.until(lambda: running.done(len(sent)))
        assert running.books() == {"taken": len(sent), "accepted": len(sent), "dead": 0}
        reported = running.state.tallies()[""]["duplicates"]
    there = room.there()
    repeated = len(room.polar.committed) - len(sent)
    assert sorted(ids(there)) == sorted(ids(sent))
    assert by_customer(there) == by_customer(sent)
    assert repeated >= ROUNDS * EVENTS_A_ROUND
    assert reported == len(sent)  # the last life had every event of the killed ones in its one batch
    record_property(
        "figures",
        f"forwarding, {ROUNDS} kills between send and mark: {len(sent)} events, {repeated} sent again, "
        f"{reported} reported as duplicates in the end, {len(there)} counted; lost 0, doubled 0"
    )
